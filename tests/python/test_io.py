"""Model folders, tensor files, the byte tokenizer."""

import json
import os
from pathlib import Path

import pytest
import torch
from small_models import VARIANTS, random_tokens, small_model

import fastweights
from fastweights import _C, io

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_folder_loads_in_cpp_and_python_alike(tmp_path: Path, variant: str) -> None:
    model = small_model(variant)
    fastweights.save_model(tmp_path / "model", model)
    python = fastweights.load_model(tmp_path / "model")
    cpp = _C.LanguageModel.load(tmp_path / "model")
    tokens = random_tokens(2, 9)
    assert not python.training
    assert python.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(python.get_parameter(name), parameter), name
        assert torch.equal(cpp.tensors()[name], parameter), name
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(python(tokens).logits, expected)
        assert torch.allclose(cpp.forward(tokens)[0], expected, atol=1e-5)


def test_a_folder_written_by_cpp_is_the_same(tmp_path: Path) -> None:
    model = small_model()
    fastweights.save_model(tmp_path / "python", model)
    model.native().save(tmp_path / "cpp")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "cpp" / name).read_bytes()


def test_loaded_weights_can_be_trained(tmp_path: Path) -> None:
    fastweights.save_model(tmp_path, small_model())
    model = fastweights.load_model(tmp_path)
    logits = model(random_tokens(1, 4)).logits
    assert logits is not None
    logits.sum().backward()
    assert model.embedding.weight.grad is not None


def test_weights_in_half_precision_are_widened(tmp_path: Path) -> None:
    model = small_model()
    fastweights.save_model(tmp_path, model, dtype=torch.bfloat16)
    assert io.load_tensors(tmp_path / "model.safetensors")["norm.weight"].dtype == torch.bfloat16
    loaded = fastweights.load_model(tmp_path)
    narrow = fastweights.load_model(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16().float())
        assert narrow.get_parameter(name).dtype == torch.bfloat16


def test_loading_and_saving_leave_the_random_numbers_alone(tmp_path: Path) -> None:
    model = small_model()
    before = torch.get_rng_state()
    fastweights.save_model(tmp_path, model)
    fastweights.load_model(tmp_path)
    model.native()
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(fastweights.FileError, match=r"config\.json"):
        fastweights.load_model(tmp_path / "nowhere")
    fastweights.save_model(tmp_path, small_model())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for broken in (b"", content[:100], content[:-1], content + b"x"):
        weights.write_bytes(broken)
        with pytest.raises(fastweights.FileError, match=r"model\.safetensors"):
            fastweights.load_model(tmp_path)
    weights.write_bytes(content)
    (tmp_path / "config.json").write_text('{"widht": 3}')
    with pytest.raises(fastweights.Error, match=r"config\.json.* unknown key"):
        fastweights.load_model(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    fastweights.save_model(tmp_path, small_model())
    path = tmp_path / "model.safetensors"
    tensors = io.load_tensors(path)
    tensors["extra"] = tensors.pop("norm.weight")
    tensors["embedding.weight"] = tensors["embedding.weight"][:10]
    io.save_tensors(path, tensors)
    with pytest.raises(fastweights.StateMismatch) as caught:
        fastweights.load_model(tmp_path)
    for part in ("norm.weight is missing", "extra is not known", "embedding.weight must be"):
        assert part in str(caught.value)


def test_a_model_with_other_parameters_is_not_saved(tmp_path: Path) -> None:
    model = small_model()
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(fastweights.StateMismatch, match="extra is not known"):
        fastweights.save_model(tmp_path, model)


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(fastweights.FileError, match="model"):
        fastweights.save_model(tmp_path / "model", small_model())
    assert (tmp_path / "model").read_text() == "in the way"


def test_tensor_files_hold_every_type(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    tensors = {str(t): (torch.randn(3, 4) * 10).to(t) for t in DTYPES}
    tensors |= {"empty": torch.zeros(0, 5), "scalar": torch.tensor(3.0)}
    tensors["strided"] = torch.randn(4, 6).t()[::2]
    io.save_tensors(path, tensors, {"key": "värde"})
    loaded = io.load_tensors(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert io.load_metadata(path) == {"key": "värde"}
    with pytest.raises(fastweights.Error, match="complex"):
        io.save_tensors(path, {"complex": torch.zeros(1, dtype=torch.complex64)})
    assert set(io.load_tensors(path)) == set(tensors)


def test_the_safetensors_package_reads_and_writes_the_same_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {str(t): torch.randint(0, 2, (3, 4)).to(t) for t in DTYPES}
    io.save_tensors(tmp_path / "ours", tensors)
    safetensors.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    for name, tensor in safetensors.load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])
    for name, tensor in io.load_tensors(tmp_path / "theirs").items():
        assert torch.equal(tensor, tensors[name])
    assert io.load_metadata(tmp_path / "theirs") == {"format": "pt"}


def test_text_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    io.write_text(tmp_path / "a.json", json.dumps({"ä": 1}))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1}
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(fastweights.FileError, match="nowhere"):
        io.write_text(tmp_path / "nowhere" / "b.json", "")


@pytest.mark.parametrize("text", ["", "plain", "naïve 漢字", "half \udcff a character"])
def test_byte_tokenizer(text: str) -> None:
    tokenizer = io.ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == list(text.encode("utf-8", "surrogateescape"))
    assert tokenizer.decode(tokens) == text


def test_byte_tokenizer_takes_any_bytes() -> None:
    tokenizer = io.ByteTokenizer()
    every = bytes(range(256))
    assert tokenizer.vocabulary_size == 256
    assert tokenizer.decode(tokenizer.encode(every)).encode("utf-8", "surrogateescape") == every
    with pytest.raises(fastweights.Error, match="256"):
        tokenizer.decode(torch.tensor([1, 256]))
