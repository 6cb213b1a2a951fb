"""OpenAI's checkpoints: real ones load bit-exactly without TensorFlow, and errors name what is wrong with others.

`golden/openai_bert_tiny` was written by TensorFlow, including the optimiser's variables.
"""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Bomb
from numpy.typing import NDArray

from igpt_ray import weights
from igpt_ray.errors import CheckpointError
from igpt_ray.model import losses
from igpt_ray.weights.tf_bundle import MAGIC, Bundle, _masked_crc32c

GOLDEN = Path(__file__).parents[1] / "golden" / "openai_bert_tiny"
NAME = "model.ckpt-7"
Arrays = dict[str, NDArray[Any]]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Prefix of a copy of the golden checkpoint."""
    for path in GOLDEN.glob(f"{NAME}.*"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / NAME


def refusal(prefix: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        weights.load_openai(prefix)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what is good


def test_a_masked_checkpoint_gives_the_outputs_of_openais_code() -> None:
    """No causal mask, shift or start vector; the loss is over masked positions; Adam's moments are not weights."""
    model = weights.load_openai(GOLDEN / NAME).requires_grad_(False)
    assert model.config.objective == "masked"
    assert not model.training
    with np.load(GOLDEN / "golden.npz") as arrays:
        x, keep = torch.from_numpy(arrays["tokens"]).long(), torch.from_numpy(arrays["keep"])
        logits, loss = torch.from_numpy(arrays["gen_logits"]), float(arrays["gen_loss"])
    torch.testing.assert_close(model(x, keep), logits, rtol=0, atol=2e-5)
    assert losses.generative(model, x, keep).item() / len(x) == pytest.approx(loss, abs=1e-6)


def test_a_checkpoint_may_be_in_a_bucket(on_moto: str, copy: Path) -> None:
    """The reader must accept URIs, not only paths."""
    from igpt_ray import storage

    for path in copy.parent.iterdir():
        storage.upload(path, storage.join(on_moto, "igpt", path.name))
    loaded = weights.load_openai(f"{on_moto}/igpt/{NAME}")
    for a, b in zip(loaded.parameters(), weights.load_openai(copy).parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ damaged files


def test_the_error_names_a_missing_data_file(copy: Path) -> None:
    for missing in sorted(copy.parent.glob("*.data-*")):
        data = missing.read_bytes()
        missing.unlink()
        assert refusal(copy) == f"{missing} is missing"
        missing.write_bytes(data)


def test_the_error_names_a_truncated_data_file(copy: Path) -> None:
    for cut in sorted(copy.parent.glob("*.data-*")):
        data = cut.read_bytes()
        for length in (0, len(data) // 2, len(data) - 1):
            cut.write_bytes(data[:length])
            assert refusal(copy).startswith(f"{cut} is truncated")
        cut.write_bytes(data)


def test_the_error_names_a_tensor_with_a_flipped_bit(copy: Path) -> None:
    """Only the checksums in the index detect it."""
    bundle = Bundle.open(str(copy))
    for name in ("model/wpe", "model/h1/attn/k_proj", "model/ln_f/g"):
        v = bundle.variables[name]
        path = Path(bundle._data_file(v.shard))
        data = path.read_bytes()
        at = v.offset + v.n_bytes // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert refusal(copy) == f"{path} is damaged: the checksum of {name} differs from the index"
        path.write_bytes(data)


def test_a_damaged_index_never_gives_other_weights(copy: Path) -> None:
    """A damaged byte is an error or, in the padding, has no effect."""
    path = copy.with_name(f"{NAME}.index")
    data, whole = path.read_bytes(), weights.load_openai(copy).state_dict()
    refused = 0
    for at in [*range(0, len(data) - 48, 23), *range(len(data) - 48, len(data))]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            loaded = weights.load_openai(copy).state_dict()
            assert all(torch.equal(loaded[name], whole[name]) for name in whole)
        except CheckpointError:
            refused += 1
    assert refused > 90
    for length in (0, 7, 47, 48, 100, len(data) - 1):
        path.write_bytes(data[:length])
        assert f"{NAME}.index is damaged, or is not the index" in refusal(copy)


def test_a_pickle_is_not_opened_as_an_index(copy: Path) -> None:
    """Even if the pickle ends like a LevelDB table."""
    trace = copy.with_name("ran")
    bomb = pickle.dumps(Bomb(trace))
    path = copy.with_name(f"{NAME}.index")
    for data in (bomb, bomb + bytes(40) + MAGIC):
        path.write_bytes(data)
        assert f"{NAME}.index is damaged" in refusal(copy)
    assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists()  # the bomb was live


def test_the_error_for_a_wrong_name_describes_the_right_one(copy: Path) -> None:
    """Users may give the folder or a file instead of the common prefix."""
    for wrong in (copy.parent, copy.with_name("model.ckpt-8"), copy.with_name(f"{NAME}.index")):
        assert "expected the path without .index, as in DIR/model.ckpt-1000000" in refusal(wrong)


# ------------------------------------------------------------------------------------------------ other content


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(**fields: int | bytes) -> bytes:
    """A protocol buffer: `f3=5` is field 3 as a varint, bytes are a message, and field 6 is a fixed32."""
    out = b""
    for name, value in fields.items():
        number = int(name[1:])
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        elif number == 6:
            out += varint(number << 3 | 5) + value.to_bytes(4, "little")
        else:
            out += varint(number << 3) + varint(value)
    return out


def table(entries: dict[bytes, bytes], compression: int = 0) -> bytes:
    """A LevelDB table of one block, in which every key is a restart point."""
    out, handles = b"", []
    for pairs in (entries, {}, {b"\xff": None}):
        body, restarts = b"", []
        for key, value in sorted(pairs.items()):
            restarts.append(len(body))
            value = handles[0] if value is None else value
            body += varint(0) + varint(len(key)) + varint(len(value)) + key + value
        restarts = restarts or [0]
        body += b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])
        handles.append(varint(len(out)) + varint(len(body)))
        body += bytes([compression])
        out += body + _masked_crc32c(body).to_bytes(4, "little")
    return out + (handles[1] + handles[2]).ljust(40, b"\0") + MAGIC


def write(prefix: Path, arrays: Arrays, header: dict[str, int] | None = None, **change: int | bytes) -> None:
    """Write a checkpoint of one data file, with `change` in the entry of model/wpe."""
    data, types = b"", {"float32": 1, "float64": 2, "float16": 19}
    entries = {b"": message(**({"f1": 1} | (header or {})))}
    for name, array in arrays.items():
        raw = array.tobytes()
        shape = b"".join(message(f2=message(f1=size)) for size in array.shape)
        fields = {"f1": types[str(array.dtype)], "f2": shape, "f4": len(data), "f5": len(raw)}
        fields |= {"f6": _masked_crc32c(raw)} | (change if name == "model/wpe" else {})
        entries[name.encode()] = message(**fields)
        data += raw
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(entries))
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Variables of the golden checkpoint."""
    bundle = Bundle.open(str(GOLDEN / NAME))
    return {name: bundle.read(name) for name in bundle.variables if name.startswith("model/") and "Adam" not in name}


def test_the_writer_of_these_tests_writes_valid_checkpoints(arrays: Arrays, tmp_path: Path) -> None:
    """The errors below must come from the changes, not from the writer."""
    write(tmp_path / "x", arrays | {"global_step": np.zeros(()), "model/wte/Adam_1": np.zeros(3)})
    whole = weights.load_openai(GOLDEN / NAME)
    for a, b in zip(weights.load_openai(tmp_path / "x").parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def f32(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("model/h1/ln_2/g"), "lacks model/h1/ln_2/g"),
        (lambda a: a.pop("model/wpe"), "lacks model/wpe: is it a checkpoint of Image GPT?"),
        (lambda a: [a.pop(name) for name in list(a)], "lacks model/wpe: is it a checkpoint of Image GPT?"),
        (lambda a: a.update({"model/clf/wclf": f32(10, 8)}), "does not have: model/clf/wclf"),
        (lambda a: a.update({"model/h1/attn/c_proj/b": f32(8)}), "does not have: model/h1/attn/c_proj/b"),
        (lambda a: a.update({"model/h3/ln_1/g": f32(8)}), "lacks model/h2/"),
        (lambda a: a.update({"model/wte": f32(20, 8)}), "model/wtet is (16, 8), expected (20, 8)"),
        (lambda a: a.update({"model/wtet": f32(512, 8)}), "model/wtet is (512, 8), expected (16, 8)"),
        (lambda a: a.update({"model/h0/mlp/c_fc/w": f32(32, 8)}), "c_fc/w is (32, 8), expected (8, 32)"),
        (lambda a: a.update({"model/h1/attn/v_proj": f32(4, 2, 8)}), "v_proj is (4, 2, 8), expected (2, 4, 8)"),
        (lambda a: a.update({"model/h0/attn/q_proj": f32(8, 8)}), "q_proj is (8, 8), expected 3 axes"),
        (lambda a: a.update({"model/h0/attn/q_proj": f32(3, 4, 8)}), "n_embd 8 is not a multiple of n_head 3"),
        (lambda a: a.update({"model/h0/attn/q_proj": f32(0, 4, 8)}), "has invalid sizes"),
        (lambda a: a.update({"model/wpe": f32(12, 8)}), "model/wpe has 12 positions, which is not a square"),
        (lambda a: a.update({"model/sos": f32(1, 8)}), "model/sos is (1, 8), expected (8,)"),
        (lambda a: a.update({"model/wte": f32(16, 8) + np.nan}), "model/wte has values that are not finite"),
        (lambda a: a.update({"model/ln_f/g": f32(8) - np.inf}), "model/ln_f/g has values that are not finite"),
        (lambda a: a.update({"model/wte": np.zeros((16, 8))}), "model/wte has the TensorFlow dtype 2; only"),
    ],
)
def test_a_checkpoint_of_another_network_is_an_error(
    arrays: Arrays, change: Callable[[Arrays], object], said: str, tmp_path: Path
) -> None:
    """Weights that are not loaded would stay uninitialised."""
    changed = dict(arrays)
    change(changed)
    write(tmp_path / "x", changed)
    assert said in refusal(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"header": {"f2": 1}}, "big-endian"),
        ({"header": {"f1": 0}}, "into data file 0 of 0"),
        ({"header": {"f1": 2**31}}, "x.data-00000-of-2147483648 is missing"),
        ({"f3": 1}, "puts model/wpe into data file 1 of 1"),
        ({"f4": 10**9}, "x.data-00000-of-00001 is truncated"),
        ({"f5": 10**12}, "is inconsistent: model/wpe"),
        ({"f2": b"".join(message(f2=message(f1=2**40)) for _ in range(2))}, "is inconsistent: model/wpe"),
        ({"f7": message(f1=0)}, "model/wpe is partitioned into slices"),
        ({"f2": 5}, "field 2 is not a message"),
        ({"f1": b""}, "field 1 is not an integer"),
        ({"f2": b"\xff"}, "it ends in the middle of a value"),
    ],
)
def test_a_malicious_index_is_an_error(arrays: Arrays, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Its checksums are valid; it requests excessive memory, or bytes of another file."""
    write(tmp_path / "x", arrays, **change)
    assert said in refusal(tmp_path / "x")


def test_an_unsupported_or_invalid_table_is_an_error(tmp_path: Path) -> None:
    """Compressed blocks, duplicate names, blocks outside the file, varints without an end."""
    path = tmp_path / "x.index"
    path.write_bytes(table({b"": b""}, compression=1))
    assert "a block is compressed" in refusal(tmp_path / "x")
    for footer, said in (
        (varint(2**40) * 4, "a block extends past its end"),
        (b"\xff" * 40, "a varint is longer than"),
    ):
        path.write_bytes(footer.ljust(40, b"\0") + MAGIC)
        assert said in refusal(tmp_path / "x")
    path.write_bytes(table({b"": message(f1=1), b"\xff\xfe": message(f1=1)}))
    assert "x.index is damaged" in refusal(tmp_path / "x")


def test_random_bytes_are_a_clear_error(tmp_path: Path) -> None:
    """Instead of an IndexError of the reader."""
    rng = np.random.default_rng(1)
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"")
    for _ in range(40):
        body = rng.bytes(int(rng.integers(1, 200)))
        for index in (body + MAGIC, table({b"": message(f1=1), b"model/wpe": body})):
            (tmp_path / "x.index").write_bytes(index)
            refusal(tmp_path / "x")
