"""Tests that arbitrary config files and overrides yield a config, or error lines that name the mistakes."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from support.any_input import TEXTS, VALUES, changed, value_or_user_error
from trapo_jax.config import Config, list_fields, load_config
from trapo_jax.config.loading import MAX_MISTAKES

MAX_LINES = MAX_MISTAKES + 1
DEFAULTS = yaml.safe_load(Config().to_yaml())
FIELDS = [field.name for field in list_fields(Config)]
# Pieces of YAML, including parts of anchors, aliases, tags, comments, and long or unusual scalars.
PIECES = st.sampled_from(
    [
        *"[]{}:,-?|>#%@!&*'\"\\ \n\t\0\ud800\u2028=~a",
        *(": ", "\n  ", "- ", "&a ", "*a", "<<: ", "---\n", "seed", "train"),
        *("!!int ", "!!binary ", "!!set ", "!!timestamp ", "!!bool ", "!!float ", "!!omap "),
        *("1:30", "0x1f", ".nan", "2024-02-31", "1e400", "yes", "0o17", "0b1", "1_000"),
    ]
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("configs") / "config.yaml"


@pytest.mark.slow
@given(
    content=st.lists(PIECES, max_size=12).map("".join)
    | st.text()
    | st.binary().map(lambda data: data.decode("latin1"))
)
def test_any_text_yields_a_config_or_is_rejected(content, file):
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with value_or_user_error(max_lines=MAX_LINES):
        load_config(Config, file)


@pytest.mark.slow
@given(data=changed(DEFAULTS))
def test_any_changed_config_yields_a_config_or_is_rejected(data, file):
    file.write_text(yaml.safe_dump(data))
    with value_or_user_error(max_lines=MAX_LINES):
        load_config(Config, file)


@given(
    overrides=st.lists(
        st.tuples(
            st.sampled_from(FIELDS) | TEXTS | st.sampled_from(FIELDS).map(lambda x: x + ".x"),
            VALUES.map(json.dumps) | st.lists(PIECES, max_size=4).map("".join),
        ),
        max_size=3,
    )
)
def test_any_overrides_yield_a_config_or_are_rejected(overrides):
    with value_or_user_error(max_lines=MAX_LINES):
        load_config(Config, None, overrides)
