import sys

import pytest

import networks.lora
from library.options.errors import UsageError
from networks.loading import check_network_module, import_network_module, parse_network_args


def test_our_module_and_any_other_on_the_path_is_found(tmp_path, monkeypatch):
    assert import_network_module("networks.lora") is networks.lora
    (tmp_path / "somebodys_network.py").write_text("def create_network(*args, **kwargs): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_network_module("somebodys_network").__name__ == "somebodys_network"


def test_a_module_that_does_not_exist_is_answered_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"Did you mean networks\.lora\?"):
        import_network_module("networks.lroa")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lycoris", None)
    monkeypatch.delitem(sys.modules, "lycoris.kohya", raising=False)
    with pytest.raises(UsageError, match="pip install lycoris_lora"):
        import_network_module("lycoris.kohya")


def test_a_module_that_needs_something_missing_is_told_apart_from_a_missing_module(tmp_path, monkeypatch):
    (tmp_path / "needy_network.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="needy_network needs the module not_installed_anywhere"):
        import_network_module("needy_network")


def test_a_module_that_is_no_network_module_is_refused():
    with pytest.raises(UsageError, match="has no create_network"):
        import_network_module("json")


def test_pairs_are_split_at_the_first_equals_sign():
    assert parse_network_args(["conv_dim=4", "a=b=c", "conv_dim=8", "empty="]) == {"conv_dim": "8", "a": "b=c", "empty": ""}
    assert parse_network_args(None) == {}


def test_what_is_no_pair_is_told_all_at_once():
    with pytest.raises(UsageError) as caught:
        parse_network_args(["conv_dim", "=4", "a=1"])
    assert len(caught.value.problems) == 2


def test_a_module_is_looked_for_without_importing_it() -> None:
    check_network_module("networks.lora")
    with pytest.raises(UsageError, match=r"Did you mean networks\.lora"):
        check_network_module("networks.lroa")
    with pytest.raises(UsageError, match="pip install lycoris_lora"):
        check_network_module("lycoris.kohya")
