"""transformers' folders: both libraries load each other's folders with equal results; other folders are errors."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HF_SHAPES, Bomb, random_hf, random_model, random_tokens, shifted
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from igpt_ray import weights
from igpt_ray.data.palette import Palette
from igpt_ray.errors import CheckpointError
from igpt_ray.generate import completion
from igpt_ray.model.image_gpt import ImageGPT

StateDict = dict[str, Tensor]


def refusal(source: Path | StateDict, **how: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        weights.load_hf(source, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ both ways


@pytest.mark.parametrize("shape", HF_SHAPES)
def test_a_folder_of_transformers_loads_as_an_equal_network(shape: dict[str, int], tmp_path: Path) -> None:
    """Covers the layout of Conv1D, the order of q, k and v, and the start vector."""
    hf = random_hf(**shape)
    hf.save_pretrained(tmp_path)
    model = weights.load_hf(tmp_path)
    assert model.config.model_dump().items() >= shape.items()
    assert not model.training
    x = random_tokens(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), hf(shifted(x, model)).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", HF_SHAPES)
def test_transformers_loads_our_folder_as_an_equal_network(shape: dict[str, int], tmp_path: Path) -> None:
    """transformers initialises missing weights randomly with only a warning. Dropout is off."""
    model = random_model(std=0.15, **shape)
    weights.save_hf(model, tmp_path)
    hf, found = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {hf.config.resid_pdrop, hf.config.embd_pdrop, hf.config.attn_pdrop} == {0}
    x = random_tokens(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(hf.eval()(shifted(x, model)).logits, model(x), rtol=0, atol=2e-5)


def test_a_round_trip_changes_no_bit(tmp_path: Path) -> None:
    model = random_model()
    weights.save_hf(model, tmp_path)
    for a, b in zip(weights.load_hf(tmp_path).parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", HF_SHAPES)
def test_greedy_completions_equal_those_of_transformers(shape: dict[str, int]) -> None:
    """transformers without a cache, ours with and without one, for several images together and one at a time."""
    hf = random_hf(**shape)
    model = weights.load_hf(hf.state_dict(), shape["n_head"])
    T, given = model.config.n_positions, random_tokens(model, 3)[:, :6]
    theirs = torch.cat([torch.full((3, 1), model.config.n_vocab), given], dim=1)
    uncached = given
    with torch.inference_mode():
        for t in range(6, T):
            theirs = torch.cat([theirs, hf(theirs).logits[:, -1:].argmax(-1)], dim=1)
            padded = torch.nn.functional.pad(uncached, (0, T - t))
            uncached = torch.cat([uncached, model(padded)[:, t : t + 1].argmax(-1)], dim=1)
    batched = completion.complete(model, given, 1, [0, 1, 2], temperature=0)
    single = torch.cat([completion.complete(model, one[None], 1, [0], temperature=0) for one in given])
    for ours in (batched, single, uncached):
        assert torch.equal(ours, theirs[:, 1:])


def test_the_saved_processor_gives_our_tokens(tmp_path: Path, palette: Palette) -> None:
    """An image of the network's size needs no resize, so that its tokens follow from the palette."""
    weights.save_hf(random_model(), tmp_path, palette)
    processor = ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    tokens = np.asarray(processor(picture, input_data_format="channels_last")["input_ids"]).reshape(-1)
    assert tokens.tolist() == palette.encode(picture).reshape(-1).tolist()
    weights.load_hf(tmp_path)


# ------------------------------------------------------------------------------------------------ their variety


def test_large_models_are_in_several_files(tmp_path: Path) -> None:
    hf = random_hf(**HF_SHAPES[0])
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    model = weights.load_hf(tmp_path)
    assert torch.equal(model.wtet.weight, hf.lm_head.weight)
    files[1].unlink()
    assert refusal(tmp_path) == f"{files[1]} is missing"
    index = tmp_path / "model.safetensors.index.json"
    for hostile in ("[]", "{}", '{"weight_map": {"a": "../../x"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(hostile)
        assert "model.safetensors.index.json is not a" in refusal(tmp_path)


def test_a_state_dict_may_lack_the_prefix_and_contain_old_buffers() -> None:
    """Old versions of transformers store the causal mask, and its base model has no prefix `transformer`."""
    hf = random_hf(**HF_SHAPES[0])
    own = hf.state_dict()
    bare = {name.removeprefix("transformer."): value for name, value in own.items()}
    buffers = {f"h.{i}.attn.{name}": torch.ones(1, 1, 16, 16).bool() for i in range(3) for name in ("bias",)}
    buffers |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    reference = weights.load_hf(own, n_head=4)
    for variant in (bare, bare | buffers, {name: value.bfloat16() for name, value in own.items()}):
        model = weights.load_hf(variant, n_head=4)
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=0)
            assert a.dtype == torch.float32
    assert "with and without the prefix" in refusal(own | bare, n_head=4)


def test_the_number_of_heads_of_a_state_dict_must_be_known_or_given() -> None:
    """It does not follow from the weights, and a wrong number gives wrong results without an error."""
    small = random_hf(n_layer=1, n_embd=512, n_head=8, n_px=2, n_vocab=4)
    assert weights.load_hf(small.state_dict()).config.n_head == 8
    own = random_hf(**HF_SHAPES[0]).state_dict()
    assert "does not contain the number of heads" in refusal(own)
    assert "set n_head" in refusal(own)
    assert "n_embd 32 is not a multiple of n_head 5" in refusal(own, n_head=5)


# ------------------------------------------------------------------------------------------------ errors


@pytest.fixture
def folder(tmp_path: Path, palette: Palette) -> Path:
    """A valid folder written by `save_hf`."""
    weights.save_hf(random_model(), tmp_path, palette)
    return tmp_path


def change_tensors(folder: Path, change: Callable[[StateDict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


C_FC = "transformer.h.1.mlp.c_fc"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{C_FC}.weight"), f"lacks {C_FC}.weight"),
        (lambda t: t.pop(f"{C_FC}.bias"), f"lacks {C_FC}.bias"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda t: t.pop("transformer.wpe.weight"), "is it an ImageGPTForCausalImageModeling of transformers?"),
        (lambda t: t.update({"score.weight": torch.zeros(2, 32)}), "does not have: transformer.score.weight"),
        (lambda t: t.update({"transformer.h.1.crossattention.q_attn.bias": torch.zeros(32)}), "does not have"),
        (lambda t: t.update({"transformer.h.7.ln_1.weight": torch.ones(32)}), "lacks transformer.h.3."),
        (lambda t: t.update({f"{C_FC}.bias": torch.full((128,), 1e-8)}), f"{C_FC}.bias is not zero"),
        (lambda t: t.update({f"{C_FC}.weight": torch.zeros(128, 32)}), "c_fc.weight is (128, 32), expected (32, 128)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(17, 32)}), "lm_head.weight is (17, 32), expected (16, 32)"),
        (lambda t: t.update({"transformer.wpe.weight": torch.zeros(17, 32)}), "17 positions, which is not a square"),
        (lambda t: t.update({"transformer.wpe.weight": torch.zeros(16)}), "is (16,), expected 2 axes"),
        (lambda t: t.update({"transformer.ln_f.weight": torch.full((32,), torch.nan)}), "are not finite"),
        (lambda t: t.update({"transformer.ln_f.weight": torch.ones(32).int()}), "is not a floating-point tensor"),
    ],
)
def test_weights_of_another_network_are_an_error(
    folder: Path, change: Callable[[StateDict], object], said: str
) -> None:
    """An additional bias has no place in the network, and missing weights would stay random."""
    change_tensors(folder, change)
    assert said in refusal(folder)
    assert said in refusal(load_file(folder / "model.safetensors"), n_head=4)


def test_a_dictionary_that_is_no_state_dict_is_refused() -> None:
    """What `torch.load` gives for a training checkpoint: the weights one level deeper."""
    assert "transformer.model is not a floating-point tensor" in refusal({"model": {}}, n_head=4)
    assert "lacks transformer.wte.weight" in refusal({}, n_head=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(model_type="gpt2"), "has the model_type 'gpt2', expected 'imagegpt'"),
        (lambda c: c.update(activation_function="gelu"), "activation_function is 'gelu', ImageGPT has 'quick_gelu'"),
        (lambda c: c.update(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (lambda c: c.update(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        (lambda c: c.update(n_head="4"), "n_head is '4'"),
        (lambda c: c.update(n_head=3), "not a multiple of n_head 3"),
        (lambda c: c.update(n_layer=2), "n_layer is 2, but its weights have 3"),
        (lambda c: c.update(vocab_size=513), "vocab_size is 513, but its weights have 17"),
        (lambda c: c.update(n_inner=64), "n_inner is 64, but its weights have 128"),
    ],
)
def test_a_config_of_another_network_is_an_error(
    folder: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    """The same shapes with another activation are a different network."""
    change_json(folder / "config.json", change)
    assert said in refusal(folder)


def test_a_palette_of_another_size_is_an_error(folder: Path) -> None:
    """The vocabulary must be the palette and the start token."""
    change_json(folder / "preprocessor_config.json", lambda c: c["clusters"].pop())
    assert "has 15 clusters, but its weights have a vocabulary of 16" in refusal(folder)
    change_json(folder / "preprocessor_config.json", lambda c: c.update(clusters=[[0, 0], [1, "a"]]))
    assert "preprocessor_config.json: its clusters are not a palette" in refusal(folder)
    with pytest.raises(CheckpointError, match="the palette has 2 colours, the model a vocabulary of 16"):
        weights.save_hf(random_model(), folder, Palette(np.zeros((2, 3), np.float32)))


def test_a_pickle_is_an_error_and_is_not_opened(folder: Path) -> None:
    """Weights in the older format could run code of their author, under either file name."""
    trace = folder / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    weights.load_hf(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    assert "model.safetensors is not a safetensors file" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "a .bin is a pickle, which can run code" in refusal(folder)
    assert not trace.exists()


def test_a_truncated_file_is_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        assert "model.safetensors is not a safetensors file" in refusal(folder)


def test_what_is_no_folder_of_transformers_is_answered_with_what_one_is(tmp_path: Path) -> None:
    assert "is not a transformers folder" in refusal(tmp_path / "nowhere")
    for wrong, said in (("{", "config.json is not JSON"), ("[]", "config.json is not a JSON object")):
        (tmp_path / "config.json").write_text(wrong)
        assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "lacks"), [(ImageGPTModel, "lm_head.weight"), (ImageGPTForImageClassification, "lm_head.weight")]
)
def test_other_networks_of_transformers_are_an_error(
    theirs: type[ImageGPTModel | ImageGPTForImageClassification], lacks: str, tmp_path: Path
) -> None:
    """Without a head there are no predictions of pixels."""
    theirs(random_hf(**HF_SHAPES[0]).config).save_pretrained(tmp_path)
    assert f"lacks {lacks}" in refusal(tmp_path)


@pytest.mark.parametrize("change", [{"objective": "masked"}, {"n_class": 10}, {"rotary": True}])
def test_a_network_that_transformers_lacks_is_not_saved(change: dict[str, Any], tmp_path: Path) -> None:
    """transformers would run a masked network with a causal mask without an error."""
    model = ImageGPT(random_model().config.model_copy(update=change))
    with pytest.raises(CheckpointError, match=r"transformers' ImageGPT has no .*: keep the release"):
        weights.save_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
