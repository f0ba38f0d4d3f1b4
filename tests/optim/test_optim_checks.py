import subprocess
import sys
from pathlib import Path

from library.options.checks_optimizer import check_optimizer_options
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.scheduler import SchedulerOptions


def test_defaults_have_no_problem():
    assert check_optimizer_options(OptimizerOptions(), SchedulerOptions()) == []


def test_all_mistakes_are_told_together():
    optimizer = OptimizerOptions(
        optimizer_type="AdamX", optimizer_args=("decouple=true", "beta"), use_8bit_adam=True, learning_rate=-1.0
    )
    problems = check_optimizer_options(optimizer, SchedulerOptions(lr_scheduler="cosinus", lr_scheduler_args=("x",)))
    for words in (
        "'decouple=true'",
        "'beta' is not key=value",
        "--use_8bit_adam and --optimizer_type AdamX both choose",
        "there is no optimizer 'AdamX'",
        "-1.0 is negative",
        "'x' is not key=value",
        "Did you mean cosine?",
    ):
        assert sum(words in problem for problem in problems) == 1, words
    assert len(problems) == 7


def test_both_old_spellings_together_are_refused():
    (problem,) = check_optimizer_options(OptimizerOptions(use_8bit_adam=True, use_lion_optimizer=True), SchedulerOptions())
    assert "--use_8bit_adam and --use_lion_optimizer both choose" in problem


def test_the_checks_do_not_import_torch():
    code = (
        "import sys\n"
        "from library.options.checks_optimizer import check_optimizer_options\n"
        "from library.options.groups.optimizer import OptimizerOptions\n"
        "from library.options.groups.scheduler import SchedulerOptions\n"
        "for name in ('AdamW8bit', 'RAdam', 'transformers.optimization.Adafactor', 'nothing.Here'):\n"
        "    check_optimizer_options(OptimizerOptions(optimizer_type=name), SchedulerOptions(lr_scheduler_type='StepLR'))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
