import json
import shutil

import pytest
import torch
import torch.distributed as dist
from pipeline_cases import STEPS, make_optimizer, make_schedulers, open_batches, open_model, write_case
from safetensors.torch import load_file
from train_and_save import train

from peft_pst.integrations.pipeline import Pipeline

CASES = {"gpt2": ("gpt2", None, 0.2), "pst": ("llama", {"sparsity": 0.6}, 0.0)}


@pytest.fixture(scope="module")
def saved(start, tmp_path_factory):
    """What two processes save, by case: without a break in `whole`, and after one in `resumed`."""
    folder = tmp_path_factory.mktemp("saved")
    for name, (kind, pst, dropout) in CASES.items():
        write_case(folder / "cases" / name, kind, pst, dropout)
        (folder / "whole" / name).mkdir(parents=True)
    jobs = {
        kind: [f"{folder / 'cases' / name}={folder / kind / name}" for name in CASES] for kind in ("whole", "resumed")
    }
    start("train_and_save.py", 2, tmp_path_factory.mktemp("logs"), "[2, 2]", *jobs["whole"]).check()
    for name in CASES:
        shutil.copytree(folder / "whole" / name / "half", folder / "resumed" / name / "half")
    start("train_and_save.py", 2, tmp_path_factory.mktemp("logs"), "[2, 2]", *jobs["resumed"], "--resume").check()
    return folder


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses_of(folder, rank=0):
    return json.loads((folder / f"{rank}.json").read_text())


def weights_of(folder):
    (path,) = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    return load_file(path)


def check_equal(a, b, tolerance):
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(saved, case):
    for rank in (0, 1):
        whole, resumed = (losses_of(saved / kind / case, rank) for kind in ("whole", "resumed"))
        assert len(whole) == STEPS and list(resumed) == [str(step) for step in range(STEPS // 2, STEPS)]
        assert resumed == {step: loss for step, loss in whole.items() if step in resumed}
    for name in ("half", "end"):
        check_equal(weights_of(saved / "whole" / case / name), weights_of(saved / "resumed" / case / name), 0)


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_one_process(saved, tmp_path, case):
    open_model(saved / "cases" / case).save_pretrained(tmp_path)
    files = {path.name for path in (saved / "whole" / case / "end").iterdir()}
    assert files == {path.name for path in tmp_path.iterdir()} | {"pipeline-0.safetensors", "pipeline-1.safetensors"}
    found, expected = weights_of(saved / "whole" / case / "end"), weights_of(tmp_path)
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}
    moved = {key for key, tensor in found.items() if not torch.equal(tensor, expected[key])}
    for layer in range(4):  # the layers of both processes
        assert any(f".{layer}." in key for key in moved)


def test_a_checkpoint_is_what_one_process_has_trained(saved, tmp_path):
    model, batches = open_model(saved / "cases" / "pst"), open_batches(saved / "cases" / "pst")
    optimizer = make_optimizer(model)
    schedulers = make_schedulers(model, optimizer)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    model.save_pretrained(tmp_path)
    check_equal(weights_of(saved / "whole" / "pst" / "end"), weights_of(tmp_path), 2e-5)
    opened = open_model(saved / "cases" / "pst", saved / "whole" / "pst" / "end").eval()
    assert opened.base_model.get_sparsity() == model.base_model.get_sparsity() > 0.59
    with torch.no_grad():
        torch.testing.assert_close(opened(**batches[0]).loss, model.eval()(**batches[0]).loss, rtol=0, atol=1e-5)


def test_resume_with_another_number_of_stages(saved, tmp_path, one_process):
    shutil.copytree(saved / "whole" / "pst" / "half", tmp_path / "half")
    train(saved / "cases" / "pst", tmp_path, [4], resume=True)
    whole = losses_of(saved / "whole" / "pst")
    assert losses_of(tmp_path) == pytest.approx({step: whole[step] for step in losses_of(tmp_path)}, abs=1e-5)
    check_equal(weights_of(tmp_path / "end"), weights_of(saved / "whole" / "pst" / "end"), 2e-5)
    assert not (tmp_path / "end" / "pipeline-1.safetensors").exists()


def test_what_is_no_checkpoint_of_this_model(saved, tmp_path, one_process):
    case, checkpoint = saved / "cases" / "gpt2", saved / "whole" / "gpt2" / "half"
    pipeline = Pipeline(open_model(case), layers=[4])
    optimizer = make_optimizer(pipeline)
    with pytest.raises(ValueError, match=r"holds no checkpoint of a pipeline: expected pipeline-\*\.safetensors"):
        pipeline.resume(tmp_path, optimizer)
    with pytest.raises(ValueError, match="is not what it was when .* was written: open the model from that folder"):
        pipeline.resume(checkpoint, optimizer)  # the model is that of the beginning
    elsewhere = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"make it from those of the pipeline, such as AdamW"):
        pipeline.save(tmp_path, elsewhere, 0)
    assert not any(tmp_path.iterdir())
    pipeline.close()


def test_what_is_no_batch(saved, one_process):
    pipeline = Pipeline(open_model(saved / "cases" / "gpt2"), micro_batches=4, layers=[4])
    batch = open_batches(saved / "cases" / "gpt2")[0]
    with pytest.raises(ValueError, match="A batch of 7 rows cannot be split into micro_batches=4"):
        pipeline.step({name: tensor[:7] for name, tensor in batch.items()})
    with pytest.raises(ValueError, match="but no labels"):
        pipeline.step({"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="No label of the batch counts"):
        pipeline.step({**batch, "labels": torch.full_like(batch["labels"], -100)})
    pipeline.close()
    with pytest.raises(ValueError, match="Give layers.*or example"):
        Pipeline(open_model(saved / "cases" / "gpt2"))
