"""The options page and the editor schema follow from the declarations."""

from library.options.dataset_schema import dataset_schema_text
from library.options.docs import DOCS, config_schema, options_page, schema_text, write_pages
from library.options.not_built import NOT_BUILT
from library.options.record import options_of
from library.options.scripts import SCRIPTS

RENEW = "run `python -m library.options.docs` and commit the result"


def test_the_committed_options_page_is_current():
    assert (DOCS / "options.md").read_text(encoding="utf-8") == options_page(), RENEW


def test_the_committed_schema_is_current():
    assert (DOCS / "options.schema.json").read_text(encoding="utf-8") == schema_text(), RENEW


def test_the_committed_schema_of_dataset_files_is_current():
    assert (DOCS / "schemas" / "dataset.schema.json").read_text(encoding="utf-8") == dataset_schema_text(), RENEW


def test_every_option_has_one_row_for_each_topic_it_stands_in():
    page = options_page()
    for script in SCRIPTS:
        for name, option in options_of(script).items():
            section = page.split(f"\n## {option.group.topic}\n")[1].split("\n## ")[0]
            assert section.count(f"| `--{name}` |") == 1, name


def test_rows_have_five_cells_and_mark_what_is_not_built():
    rows = [line for line in options_page().splitlines() if line.startswith("| `--")]
    for row in rows:
        assert row.replace("\\|", "").count(" | ") == 4, row
        name = row.split("`")[1].removeprefix("--")
        assert ("Not built yet" in row) == (name in NOT_BUILT)


def test_the_schema_knows_types_ranges_and_choices_and_no_secrets():
    schema = config_schema()
    table = schema["definitions"]["table"]["properties"]
    assert table["network_dim"] | {"description": ""} == {"description": "", "type": "integer", "minimum": 0}
    assert table["mixed_precision"]["enum"] == ["no", "fp16", "bf16"]
    assert table["optimizer_args"]["items"] == {"type": "string"}
    assert table["max_token_length"]["enum"] == [150, 225, 75]
    assert "minimum" not in table["noise_offset"]
    assert not {"huggingface_token", "wandb_api_key", "config_file"} & table.keys()
    assert schema["properties"].keys() == table.keys()


def test_pages_are_written_to_a_folder(tmp_path):
    write_pages(tmp_path / "docs")
    assert (tmp_path / "docs" / "options.md").read_text(encoding="utf-8") == options_page()
    assert (tmp_path / "docs" / "schemas" / "dataset.schema.json").read_text(encoding="utf-8") == dataset_schema_text()
