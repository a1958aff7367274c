"""The templates of model cards: Jinja, filled in by `peft_pst.integrations.model_card`."""
