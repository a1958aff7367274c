"""The README as a user walks it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run_one_after_the_other_and_then_the_commands(local_hub):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    script = local_hub / "readme.py"
    script.write_text("\n".join(blocks))
    result = subprocess.run([sys.executable, script], cwd=local_hub, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'sparsity'" in result.stdout + result.stderr

    section = README.split("## The command")[1].split("\n## ")[0]
    commands = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()
    assert len(commands) == 9
    for command in commands:
        if not command.startswith(
            "peft-pst push"
        ):  # it would go to the real Hub; tests/integrations/test_hub.py pushes
            name, *arguments = shlex.split(command)
            run = [Path(sys.executable).with_name(name), *arguments]
            result = subprocess.run(run, cwd=local_hub, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr


def test_every_command_is_a_target_or_a_script():
    commands = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    makes = [command.split()[1] for command in commands if command.startswith("make ")]
    assert {"demo", "test"} <= set(makes) <= targets
    for script in re.findall(r"(?:examples|benchmarks)/\w+\.py", README):
        assert (ROOT / script).is_file(), script


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
