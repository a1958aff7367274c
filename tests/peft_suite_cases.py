"""Cases of other patterns, importances and updates for PEFT's own test suite, in the form of its PST cases.

MOD, the package under test, is set by the plugin that reads this file.
"""

CONFIG = MOD.PSTConfig  # noqa: F821
MANDATORY = {}
SUPPORTS_CONV1D = True
SPARSE = {"initial_sparsity": 0.5}
RANDOM = {"init_weights": False}  # not the identity at the start
METHODS = {
    "2:4": {"pattern": "2:4"},
    "block:8x1": {"pattern": "block:8x1"},
    "neuron": {"pattern": "neuron"},
    "movement": {"importance": "movement"},
    "full": {"update": "full"},
    "boost": {"boost": 1},
}
# linear layers of the suite's tiny models with 37 or 4 intermediate units, which no group of 4 or 8 divides
ODD = {"exclude_modules": r".*(\.\d+\.(intermediate|output)\.dense|\.wi|\.wo|fc1|fc2)"}


def _custom(name: str) -> list[tuple]:
    """Test name, model, config and its arguments, for layers whose shapes the method divides."""
    # the suite trains with a learning rate of 0.5, from which two layers with factors of N(0, 1) do not recover
    both = {"target_modules": ["lin0", "lin1"], "coupled_modules": [["lin0", "lin1"]], "beta": 0.01}
    choices = {
        "2:4": [("MLP", {"target_modules": ["lin1"]}), ("MLP", {"target_modules": "lin1"})],
        "block:8x1": [
            ("MLP2", {"target_modules": ["lin0"]}),
            ("MLP2", {"target_modules": "lin0"}),
            ("MLP2", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ],
        "neuron": [("MLP", both), ("MLP2", both), ("MLP", {**both, "target_modules": "all-linear"})],
    }
    everywhere = [
        ("MLP", {"target_modules": ["lin0"]}),
        ("MLP", {"target_modules": ["lin0", "lin1"]}),
        ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("MLP", {"target_modules": "all-linear"}),
        ("EmbConv1D", {"target_modules": ["conv1d"]}),
    ]
    return choices.get(name, everywhere)


CUSTOM = [
    (f"{model} {i} PST-{name}{tag}", model, CONFIG, {**arguments, **method, **extra})
    for name, method in METHODS.items()
    for i, (model, arguments) in enumerate(_custom(name))
    for tag, extra in (("", {}), (" sparse", SPARSE))
]
_MOVEMENT = {"importance": "movement", "update": "full", **RANDOM, **SPARSE}
MULTI = [
    ("PST Same", "pst", CONFIG, {"target_modules": ["lin0"], **_MOVEMENT}, {"target_modules": ["lin0"], **_MOVEMENT}),
    (
        "PST Different",
        "pst",
        CONFIG,
        {"target_modules": ["lin0"], **_MOVEMENT},
        {"target_modules": ["lin1"], **_MOVEMENT},
    ),
]


def _of_task(task: str) -> list[tuple]:
    shared = {"task_type": task, "target_modules": None}
    return [
        (f"PST-{name}{tag}", CONFIG, {**shared, **method, **(ODD if ":" in name else {}), **extra})
        for name, method in METHODS.items()
        for tag, extra in (("", {}), ("-sparse", SPARSE))
    ]


TRANSFORMERS = {
    "test_decoder_models": _of_task("CAUSAL_LM"),
    "test_encoder_decoder_models": _of_task("SEQ_2_SEQ_LM"),
    "test_feature_extraction_models": _of_task("FEATURE_EXTRACTION"),
    "test_seq_classifier": _of_task("SEQ_CLS"),
    "test_token_classification_qa": _of_task("TOKEN_CLS"),
}
NONIDENTITY = {"target_modules": ["lin0"], **_MOVEMENT}
COMPILE = [(name, arguments) for name, _, arguments in _of_task("CAUSAL_LM")]
# as in the suite's own cases: tests of prompt learning, or about LoRA's options and defaults
NOT_APPLICABLE = {
    "test_prompt_learning_with_gradient_checkpointing",
    "test_add_weighted_adapter_cat_with_rank_pattern",
    "test_base_model_module_named_like_peft_prefix",
    "test_default_target_modules_list_of_str",
    "test_default_target_modules_str",
}
