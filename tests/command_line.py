"""The command line within the test's own process, and words that keep benchmarks small."""

import json
from typing import Any

from click.testing import CliRunner, Result

from quire import cli

TEXT = "The keeper wrote down the weather every morning. In winter the page filled with wind and broken glass. "
LITTLE = ("--questions", "2", "--passages", "2", "--passage-tokens", "60")


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.main, [*map(str, words)], prog_name="quire")


def json_of(*words: object) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
