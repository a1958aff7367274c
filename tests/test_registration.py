import importlib
import pickle
import subprocess
import sys

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

import peft_pst


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_pst_is_a_member_like_any_other():
    member = PeftType("PST")
    assert member is PeftType.PST is PeftType["PST"] and member == "PST" and member.value == "PST"
    assert member in list(PeftType) and "PST" in PeftType.__members__
    assert pickle.loads(pickle.dumps(member)) is member
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is peft_pst.PSTModel


def test_importing_again_changes_nothing():
    members = list(PeftType)
    importlib.reload(peft_pst)
    assert list(PeftType) == members


def test_steps_aside_for_a_pst_of_peft():
    code = """
import peft, warnings
from peft.utils.peft_types import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
member = str.__new__(PeftType, "PST"); member._name_ = member._value_ = "PST"
PeftType.PST = member
PeftType._member_names_.append("PST"); PeftType._member_map_["PST"] = PeftType._value2member_map_["PST"] = member
class Theirs: __module__ = "peft.tuners.pst"
PEFT_TYPE_TO_TUNER_MAPPING[member] = Theirs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_pst
assert PEFT_TYPE_TO_TUNER_MAPPING[member] is Theirs
assert any("has a method named PST of its own" in str(w.message) for w in caught), caught
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_without_the_import_peft_does_not_know_pst(tmp_path):
    """What README and model cards warn of."""
    peft_pst.PSTConfig().save_pretrained(tmp_path)
    result = python(f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert "KeyError: 'PST'" in result.stderr
    result = python(f"import peft_pst; from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert result.returncode == 0, result.stderr


def test_nothing_optional_is_imported():
    code = "import sys, peft_pst; print(sorted({'matplotlib', 'datasets', 'numba'} & set(sys.modules)))"
    assert python(code).stdout.strip() == "[]"
