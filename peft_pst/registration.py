"""Makes PST known to PEFT, which has no entry point for methods from outside.

`peft.utils.register_peft_method` insists on a member of the enum `PeftType`, so the member is added first. This module
has to run before `PSTConfig()` is called, which it does: `import peft_pst` calls `register`.
"""

import warnings

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from .config import PSTConfig
from .model import PSTModel

NAME = "PST"


def register() -> None:
    """Register `PSTConfig` and `PSTModel` with PEFT under the type "PST".

    Calling it again changes nothing. If PEFT has a PST of its own, PEFT's stays and a warning says so.
    """
    if NAME in PeftType.__members__:
        registered = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(NAME))
        if registered is not None and registered.__module__ != PSTModel.__module__:
            warnings.warn(
                f"This PEFT has a method named PST of its own ({registered.__module__}); peft_pst leaves it in place "
                "and is not registered. Use PEFT's, or install a PEFT without it.",
                stacklevel=3,
            )
        return
    _add_member(NAME)
    register_peft_method(name=NAME.lower(), config_cls=PSTConfig, model_cls=PSTModel)


def _add_member(name: str) -> None:
    """Add `name` to the str-valued enum `PeftType` the way the enum machinery itself does at class creation."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    setattr(PeftType, name, member)  # before it is in the member map: members cannot be reassigned
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
