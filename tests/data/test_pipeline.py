"""Batches come in an order that seed and epoch decide, go on where they were left, and leave no process behind."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from stgcma_fast.config import SwinConfig
from stgcma_fast.data import pipeline, torch_backend
from stgcma_fast.data.config import media_config
from stgcma_fast.data.errors import MediaError
from stgcma_fast.data.pipeline import AVPipeline, Items
from stgcma_fast.data.sample import Frames, Sample

CPU = torch.device("cpu")


class Numbers:
    """A data set of n items, some of them broken. What is read of one says in which epoch and with which draw."""

    config = media_config("ave", SwinConfig())
    root, split = Path("numbers"), "train"

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)

    def __len__(self):
        return self.count

    def sample(self, index, epoch=0):
        source = Path(f"{'broken' if index in self.broken else 'good'}/{index}.mp4")
        draw = torch.rand(3, generator=torch.Generator().manual_seed(1000 * epoch + index))
        target = {"epoch": torch.tensor(epoch), "draw": draw}
        return Sample(id=str(index), video=Frames(source, (0,), 1), audio=source, target=target, meta={"kind": f"k{index % 2}"})


def read(sample, config, media):
    if sample.audio.parent.name == "broken":
        raise MediaError(sample.audio, "no track")
    return dict(sample.target)


@pytest.fixture(autouse=True)
def _read(monkeypatch):
    monkeypatch.setattr(torch_backend, "read_sample", read)


def ids(batches):
    return [int(name) for batch in batches for name in batch["id"]]


def equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def open_files():
    return len(os.listdir("/proc/self/fd"))


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


SIZES = [(1, 1, 1), (7, 2, 1), (7, 2, 3), (12, 4, 3), (13, 4, 3), (5, 1, 4), (2, 3, 5)]


@pytest.mark.parametrize(("count", "batch_size", "world_size"), SIZES)
def test_ranks_share_every_item_once(count, batch_size, world_size):
    """Without shuffling: as evaluation needs it, none twice and none left out, in the data set's order."""
    seen = []
    for rank in range(world_size):
        pipe = AVPipeline(Numbers(count), batch_size, rank=rank, world_size=world_size, workers=0)
        batches = list(pipe)
        assert len(batches) == len(pipe)
        assert all(len(batch["id"]) == batch_size for batch in batches[:-1])
        assert ids(batches) == list(range(rank, count, world_size))
        seen += ids(batches)
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(("count", "batch_size", "world_size"), SIZES)
def test_ranks_train_equally_long(count, batch_size, world_size):
    """With shuffling every rank has as many batches; every item comes, and none more than once more than another."""
    ranks = [
        list(AVPipeline(Numbers(count), batch_size, rank=rank, world_size=world_size, shuffle=True, seed=3, workers=0))
        for rank in range(world_size)
    ]
    assert len({tuple(len(batch["id"]) for batch in batches) for batches in ranks}) == 1
    counts = Counter(index for batches in ranks for index in ids(batches))
    assert sorted(counts) == list(range(count))
    assert sum(counts.values()) == -(-count // world_size) * world_size
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(7, 2, 1), (13, 4, 3), (12, 4, 3)])
def test_drop_last(count, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        pipe = AVPipeline(Numbers(count), batch_size, rank=rank, world_size=world_size, shuffle=True, drop_last=True, workers=0)
        assert len(pipe) == count // world_size // batch_size
        assert all(len(batch["id"]) == batch_size for batch in pipe)
        seen += ids(pipe)
    assert len(set(seen)) == len(seen)


def test_ranks_are_those_of_torch_distributed(monkeypatch):
    """Under DDP every process read the same items, without a word."""
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert ids(AVPipeline(Numbers(7), 2, workers=0)) == [1, 4]
    assert ids(AVPipeline(Numbers(7), 2, workers=0, rank=0, world_size=1)) == list(range(7))


def test_a_rank_without_items_goes_through_epochs_as_the_others():
    pipe = AVPipeline(Numbers(1), 2, workers=0, rank=1, world_size=2)
    assert [*pipe] == []
    assert pipe.state_dict()["epoch"] == 1


def test_order_is_that_of_seed_and_epoch():
    def orders(seed, workers, epochs=2):
        pipe = AVPipeline(Numbers(40), 3, shuffle=True, seed=seed, workers=workers)
        return [ids(pipe) for _ in range(epochs)]

    first, second = orders(0, 0)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert first != list(range(40))
    assert orders(0, 2) == [first, second]
    assert orders(1, 0)[0] not in (first, second)
    late = AVPipeline(Numbers(40), 3, shuffle=True, workers=0)
    late.set_epoch(1)
    assert ids(late) == second


def test_batches_are_the_same_from_workers():
    """An item's draws follow the epoch; workers hand over tensors, words and ids in one order."""
    data = Numbers(11)
    alone, shared = (AVPipeline(data, 3, shuffle=True, seed=5, workers=workers) for workers in (0, 2))
    for epoch in range(2):
        for a, b in zip(list(alone), list(shared), strict=True):
            equal(a, b)
            assert a["epoch"].tolist() == [epoch] * len(a["id"])
            assert a["kind"] == [f"k{int(name) % 2}" for name in a["id"]]
            for name, draw in zip(a["id"], a["draw"], strict=True):
                assert torch.equal(draw, data.sample(int(name), epoch).target["draw"])
    assert alone.epoch == shared.epoch == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_models_random_numbers_are_left_alone(workers):
    state = torch.get_rng_state()
    list(AVPipeline(Numbers(5), 2, shuffle=True, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_batches_arrive_on_the_device():
    expected = list(AVPipeline(Numbers(5), 2, workers=0))
    for batch, other in zip(AVPipeline(Numbers(5), 2, backend="pyav", device="cuda", workers=2), expected, strict=True):
        assert {value.device.type for value in batch.values() if torch.is_tensor(value)} == {"cuda"}
        equal({key: value.cpu() if torch.is_tensor(value) else value for key, value in batch.items()}, other)


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5, 7, 9])
@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_where_it_was_saved(place, workers):
    """Four batches an epoch: 4 is an epoch's end, 3 the place before its last batch; what was made ahead comes again."""

    def stream(pipe):
        while True:
            yield from pipe

    def pipe(**options):
        return AVPipeline(Numbers(11), 3, shuffle=True, seed=2, workers=workers, **options)

    whole = stream(pipe())
    expected = [next(whole) for _ in range(12)]
    broken = pipe()
    batches = stream(broken)
    for _ in range(place):
        next(batches)
    state = torch.load(_saved(broken.state_dict()), weights_only=True)
    batches.close()
    resumed = pipe()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.epoch == place // 4
    batches = stream(resumed)
    for number, batch in enumerate(expected[place:], place + 1):
        equal(batch, next(batches))
        assert resumed.state_dict()["batch"] == number % 4


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_an_iteration_left_early_begins_anew():
    pipe = AVPipeline(Numbers(9), 2, shuffle=True, workers=0)
    first = ids(pipe)
    again = AVPipeline(Numbers(9), 2, shuffle=True, workers=0)
    for batch in again:
        assert ids([batch]) == first[:2]
        break
    iter(again)  # made and dropped, as Lightning does
    assert again.state_dict()["batch"] == 1
    assert ids(again) == first
    assert again.epoch == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_one_iteration_at_a_time(workers):
    """A second one has all batches; the first does not go on among them, and leaves the second's place alone."""
    pipe = AVPipeline(Numbers(9), 2, workers=workers)
    first = iter(pipe)
    next(first)
    second = iter(pipe)
    batches = [next(second)]
    with pytest.raises(RuntimeError, match="another one of the same pipeline was begun"):
        next(first)
    assert pipe.state_dict()["batch"] == 1
    assert ids([*batches, *second]) == list(range(9))
    assert pipe.epoch == 1
    assert not children()


def test_a_state_of_another_order_is_refused():
    pipe = AVPipeline(Numbers(9), 2, seed=1, workers=0)
    state = pipe.state_dict()
    for _ in pipe:
        middle = pipe.state_dict()
        break
    other = AVPipeline(Numbers(9), 3, seed=2, workers=0)
    other.load_state_dict(state)  # between epochs nothing depends on it
    with pytest.raises(ValueError, match=r"middle of an epoch.*batch_size 2 \(here 3\), seed 1 \(here 2\)"):
        other.load_state_dict(middle)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_raised(workers):
    pipe = AVPipeline(Numbers(9, broken=[4]), 2, workers=workers)
    batches = iter(pipe)
    assert ids([next(batches), next(batches)]) == [0, 1, 2, 3]
    with pytest.raises(MediaError) as caught:
        next(batches)
    assert (caught.value.path, caught.value.cause) == ("broken/4.mp4", "no track")
    assert not children()


def test_broken_files_are_replaced(caplog):
    """By others, the same for any number of workers; every broken file is told once and noted."""
    data = Numbers(20, broken=[4, 5, 6, 13])
    results = {}
    for workers in (0, 2):
        caplog.clear()
        pipe = AVPipeline(data, 3, on_error="skip", workers=workers, seed=7)
        with caplog.at_level(logging.WARNING, "stgcma_fast.data"):
            epochs = [list(pipe), list(pipe)]
        assert pipe.skipped == {f"broken/{index}.mp4": "no track" for index in (4, 5, 6, 13)}
        assert Counter(record.args[0] for record in caplog.records) == dict.fromkeys(pipe.skipped, 1)
        assert all("skipped" not in batch for batch in epochs[0])
        results[workers] = [ids(batches) for batches in epochs]
    assert results[0] == results[2]
    for epoch in results[0]:
        assert [a for i, a in enumerate(epoch) if i not in data.broken] == [i for i in range(20) if i not in data.broken]
        assert not data.broken & set(epoch)
    assert results[0][0] != results[0][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_split_without_a_readable_clip_is_raised(workers):
    pipe = AVPipeline(Numbers(6, broken=range(6)), 2, on_error="skip", workers=workers)
    with pytest.raises(MediaError, match=r"numbers: no clip of split 'train' can be read; broken/0.mp4: no track"):
        next(iter(pipe))


def test_replacements_end():
    """However many are broken, the one that is not is found."""
    for good in range(8):
        items = Items(Numbers(8, broken=set(range(8)) - {good}), "skip", seed=1)
        assert items.read(3, 0, lambda sample: (read(sample, None, None), sample.id)[1], {}) == str(good)


def test_other_errors_name_themselves(monkeypatch):
    def fail(sample, config, media):
        raise KeyError("fault in the code")

    monkeypatch.setattr(torch_backend, "read_sample", fail)
    with pytest.raises(KeyError, match="fault in the code"):
        next(iter(AVPipeline(Numbers(4), 2, workers=2)))
    assert not children()


def test_a_killed_worker_is_told(monkeypatch):
    def die(sample, config, media):
        if sample.id == "5":
            os.kill(os.getpid(), signal.SIGKILL)
        return dict(sample.target)

    monkeypatch.setattr(torch_backend, "read_sample", die)
    pipe = AVPipeline(Numbers(12), 2, workers=2)
    with pytest.raises(RuntimeError, match=r"worker.*(killed by signal|exited unexpectedly)"):
        list(pipe)
    assert not children()
    monkeypatch.setattr(torch_backend, "read_sample", read)
    assert ids(pipe) == list(range(12))


def test_a_worker_killed_before_its_batch_is_fetched_is_told(monkeypatch):
    """Its memory is asked of the worker itself. Whoever asks may learn that there is none before the system says so."""

    def work(job):
        if job == 2:
            time.sleep(0.5)  # Until job 1 is on its way.
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((1000,), job)

    stream = torch_backend.in_order(work, range(3), 1)
    assert next(stream)[0] == 0
    (worker,) = children()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        while "\nState:\tZ" not in Path(f"/proc/{worker}/status").read_text():
            time.sleep(0.01)
        with monkeypatch.context() as patch:
            patch.setattr(BaseProcess, "is_alive", lambda self: True)
            with pytest.raises(RuntimeError, match=r"a worker exited unexpectedly.*Connection"):
                next(stream)
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert not children()


def test_an_error_of_a_connection_that_work_had_is_its_own():
    def work(job):
        raise ConnectionResetError("the storage hung up")

    with pytest.raises(ConnectionResetError, match="the storage hung up"):
        next(torch_backend.in_order(work, range(3), 1))
    assert not children()


class StopError(Exception):
    pass


def test_nothing_stays_behind():
    """Whole epochs, loops that are left, errors of the loop's body and of files, and ^C: no process and no open file more."""
    good, bad = AVPipeline(Numbers(6), 2, workers=2), AVPipeline(Numbers(6, broken=[5]), 2, workers=2)

    def leave(how):
        for _ in good:
            if how == "break":
                break
            if how == "raise":
                raise StopError
            if how == "interrupt":
                signal.raise_signal(signal.SIGINT)

    def round_():
        for how in ("whole", "break", "raise", "interrupt"):
            with contextlib.suppress(StopError, KeyboardInterrupt):
                leave(how)
        unfinished = iter(good)
        for _ in range(len(good)):  # as Lightning: counted to the last batch, never to the end
            next(unfinished)
        try:
            list(bad)
        except MediaError:  # with it lives its traceback
            assert not children()
        else:
            pytest.fail("nothing was raised")

    round_()
    before = open_files()
    for _ in range(3):
        round_()
    for _ in range(50):  # threads of queues close their pipes in a moment
        if open_files() <= before:
            break
        time.sleep(0.1)
    assert open_files() <= before


def test_interrupt_of_the_whole_group(tmp_path):
    """^C in a terminal reaches workers too: all go, with nothing said but the main process's KeyboardInterrupt."""
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import signal, time\n"
        # Tests in a shell's background ignore ^C, and so would what they start.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.data.test_pipeline import AVPipeline, Numbers, torch_backend, read\n"
        "def slow(sample, config, media):\n"
        "    time.sleep(0.05)\n"
        "    return read(sample, config, media)\n"
        "torch_backend.read_sample = slow\n"
        "while True:\n"
        "    for batch in AVPipeline(Numbers(400), 2, workers=2):\n"
        "        print('batch', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "batch\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1
    for _ in range(50):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes are left")


@pytest.fixture
def dali(monkeypatch):
    """A DALI backend that serves unless it has reasons not to."""
    module = types.ModuleType("stgcma_fast.data.dali")
    module.reasons = []
    module.dali_refusals = lambda dataset, device: module.reasons

    class DaliBackend:
        def __init__(self, items, *, batch_size, device, workers=None):
            self.arguments = batch_size, device, workers

        def run(self, batches, epoch):
            for batch in batches:
                yield {"id": [str(index) for index in batch]}

    module.DaliBackend = DaliBackend
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(pipeline, "_logged", set())
    return module


def test_choice_of_backend(dali, caplog):
    data, cuda = Numbers(4), torch.device("cuda")
    assert pipeline.choose("auto", data, CPU) == "pyav"
    assert pipeline.choose("auto", data, cuda) == "dali"
    assert pipeline.choose("pyav", data, cuda) == "pyav"
    dali.reasons = ["it is not installed", "it has no decoder"]
    with caplog.at_level(logging.INFO, "stgcma_fast.data"):
        assert [pipeline.choose("auto", data, cuda) for _ in range(3)] == ["pyav"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "media are decoded by PyAV, not by DALI: it is not installed; it has no decoder"
    ]
    with pytest.raises(ValueError, match="backend='dali' was asked for, but it is not installed; it has no decoder"):
        pipeline.choose("dali", data, cuda)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend='pyav' was asked for, but av is not installed .*; torchvision is not"):
        pipeline.choose("pyav", Numbers(4), CPU)


def test_backend_dali_is_given_what_it_needs(dali):
    pipe = AVPipeline(Numbers(4), 3, backend="dali", workers=5)
    assert pipe.backend == "dali"
    assert pipe._backend.arguments == (3, CPU, 5)
    assert ids(pipe) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("count", "options", "text"),
    [
        (0, {}, "numbers: split 'train' has no items"),
        (4, {"batch_size": 0}, "batch_size: got 0"),
        (4, {"rank": 2, "world_size": 2}, "rank: got 2 of world_size 2, expected 0 to 1"),
        (4, {"seed": -1}, "seed: got -1"),
        (4, {"workers": -1}, "workers: got -1"),
        (4, {"on_error": "ignore"}, "on_error: got 'ignore', allowed are 'raise', 'skip'"),
        (4, {"backend": "gpu"}, "backend: got 'gpu', allowed are 'auto', 'pyav', 'dali'"),
        (4, {"shuffle": True, "drop_last": True, "world_size": 3}, "no whole batch of 2 for each of 3 processes"),
    ],
)
def test_refused_arguments(count, options, text):
    with pytest.raises(ValueError, match=text):
        AVPipeline(Numbers(count), **{"batch_size": 2, **options})


def test_lightning_saves_and_restores_the_place(tmp_path):
    """A run stopped in the middle of its second epoch goes on with the batches that it had not seen."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(3, 1), []

        def training_step(self, batch, batch_idx):
            self.seen.append((batch["epoch"].tolist(), batch["id"]))
            return self.layer(batch["draw"]).sum()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(resume=None, **options):
        model = Model()
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **options
        )
        train, val = (AVPipeline(Numbers(n), size, shuffle=n > 4, workers=0) for n, size in ((11, 3), (4, 2)))
        trainer.fit(model, train, val, ckpt_path=resume)
        return model.seen

    save = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(callbacks=[save])
    assert [epochs[0] for epochs, _ in whole] == [0] * 4 + [1] * 4 + [2] * 4
    for step in (1, 4, 6, 7, 8):
        assert fit(resume=tmp_path / f"step={step}.ckpt", enable_checkpointing=False) == whole[step:]
    # Epochs that are cut short differ from one another, too.
    assert fit(limit_train_batches=2, enable_checkpointing=False) == whole[0:2] + whole[4:6] + whole[8:10]
