"""With this file `optimum-cli export onnx` opens sparse checkpoints: it imports whatever lies in its namespace
`optimum.commands.register`, where this is installed to.

Without, transformers 4.57 knows nothing of the layout, warns, and optimum exports random weights.
"""

from optimum.commands.export.onnx import ONNXExportCommand

export = ONNXExportCommand.run


def run(command: ONNXExportCommand) -> None:
    """Export as ever, but with models made dense after they are opened."""
    from optimum.exporters.tasks import TasksManager
    from transformers import PreTrainedModel

    from peft_pst import densify

    opened = TasksManager.get_model_from_task

    def get_model_from_task(*args: object, **kwargs: object) -> object:
        model = opened(*args, **kwargs)
        return densify(model) if isinstance(model, PreTrainedModel) else model

    TasksManager.get_model_from_task = staticmethod(get_model_from_task)
    export(command)


ONNXExportCommand.run = run
