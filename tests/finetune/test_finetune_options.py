"""The command lines of the tools that prepare data are those of sd-scripts, and their manuals come at once."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "tests" / "compat" / "cli_options.json").read_text(encoding="utf-8"))
SCRIPTS = [
    "finetune/clean_captions_and_tags.py",
    "finetune/merge_captions_to_metadata.py",
    "finetune/merge_dd_tags_to_metadata.py",
    "finetune/prepare_buckets_latents.py",
    "tools/canny.py",
    "tools/resize_images_to_resolution.py",
    "tools/show_metadata.py",
]
OURS = {"finetune/prepare_buckets_latents.py": {"vae", "no_half_vae"}, "tools/show_metadata.py": {"raw"}}
"""Options that sd-scripts does not have."""


def row(action: argparse.Action) -> dict[str, Any]:
    """Describe an option as the table does."""
    is_switch = isinstance(action, argparse._StoreTrueAction)
    kind = None if is_switch else getattr(action.type, "__name__", "str")
    return {
        "flags": list(action.option_strings),
        "dest": action.dest,
        "kind": "store_true" if is_switch else "store",
        "type": kind,
        "nargs": None if is_switch else action.nargs,
        "default": action.default,
        "choices": None if action.choices is None else list(action.choices),
        "required": action.required,
    }


def command_line(script: str) -> argparse.ArgumentParser:
    parser = importlib.import_module(script.removesuffix(".py").replace("/", ".")).command_line()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_types_and_defaults_are_those_of_sd_scripts(script: str) -> None:
    rows = {action.dest: row(action) for action in command_line(script)._actions if action.dest != "help"}
    assert rows.keys() - {wanted["dest"] for wanted in TABLE[script]} == OURS.get(script, set[str]())
    assert [rows[wanted["dest"]] for wanted in TABLE[script]] == TABLE[script]
    positionals = [action.dest for action in command_line(script)._actions if not action.option_strings]
    assert positionals == [wanted["dest"] for wanted in TABLE[script] if not wanted["flags"]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_says_what_it_is_for(script: str) -> None:
    parser = command_line(script)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert f"python {script} " in (parser.description or "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_at_once_and_loads_nothing_heavy(script: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: status = stop.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'cv2', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'loads {heavy}' if heavy else status)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert f"python {script}" in shown.stdout
