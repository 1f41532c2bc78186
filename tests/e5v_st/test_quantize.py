"""``quantize=`` and ``--quantize``: what is quantised, what stays, and what is said of the difference."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch

import e5v_st
from e5v_st import probes, quantize
from e5v_st.cli import main
from e5v_st.index import embed

#: mode -> (library, class of a quantised weight, least cosine to the full precision that e5v-tiny's inputs may have)
MODES = {
    "int8": ("bitsandbytes", "Int8Params", 0.999),
    "nf4": ("bitsandbytes", "Params4bit", 0.95),
    "fp8": ("torchao", "Float8Tensor", 0.995),
}


@pytest.fixture(params=MODES)
def mode(request):
    pytest.importorskip(MODES[request.param][0])
    return request.param


@pytest.fixture(scope="module")
def full():
    return probes.embed_probes(e5v_st.load("e5v-tiny", device="cpu"))


def test_the_language_model_is_quantised_and_the_tower_is_not(small, mode):
    model = e5v_st.load(small, device="cpu", quantize=mode)[0].model
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            quantised = (
                type(module.weight).__name__ == MODES[mode][1] or type(module.weight.data).__name__ == MODES[mode][1]
            )
            assert quantised == name.startswith("language_model."), name


def test_embeddings_stay_close_to_full_precision(full, mode):
    found = probes.embed_probes(e5v_st.load("e5v-tiny", device="cpu", quantize=mode))
    for kind, expected in full.items():
        np.testing.assert_allclose(np.linalg.norm(found[kind], axis=1), 1, atol=1e-5)
        cosines = (found[kind] * expected).sum(1)
        assert MODES[mode][2] < cosines.min() <= cosines.max() < 0.999999  # 1 would mean that nothing was quantised


def test_an_adapter_works_on_a_quantised_model(small, goldens, mode, pictures):
    adapter = goldens / "legacy_adapter"
    expected = e5v_st.load(small, device="cpu", adapter=adapter).encode(["a dog", pictures[0]])
    found = e5v_st.load(small, device="cpu", adapter=adapter, quantize=mode).encode(["a dog", pictures[0]])
    without = e5v_st.load(small, device="cpu", quantize=mode).encode(["a dog", pictures[0]])
    near, far = (expected * found).sum(1), (expected * without).sum(1)
    assert (near > far).all()


def test_weights_that_are_not_numbers_are_refused_before_they_are_hidden(small, tmp_path, mode):
    from safetensors.torch import load_file, save_file

    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight") and "language" in name)
    weights[name][3, 3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight are not all numbers"):
        e5v_st.load(tmp_path, device="cpu", quantize=mode)


def test_e5v_embed_prints_the_cosine_and_keeps_the_mode(small, tmp_path, mode, capsys):
    (tmp_path / "rows.csv").write_text("text\na dog\na cat\n")
    words = ["embed", str(tmp_path / "rows.csv"), str(tmp_path / "out"), "--model", str(small), "--device", "cpu"]
    assert main([*words, "--quantize", mode]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(mode))
    texts, images = re.findall(r"8 (?:texts|images) mean (0\.\d{4}), least (0\.\d{4})", line)
    expected = probes.cosines(
        probes.embed_probes(e5v_st.load(small, device="cpu", quantize=mode)),
        probes.embed_probes(e5v_st.load(small, device="cpu")),
    )
    for said, kind in ((texts, "texts"), (images, "images")):
        assert list(map(float, said)) == pytest.approx([expected[kind].mean(), expected[kind].min()], abs=1e-4)
    assert json.loads((tmp_path / "out" / embed.MANIFEST).read_text())["quantize"] == mode
    assert main(words) == 1  # the same folder cannot go on in full precision
    assert main(["search", str(tmp_path / "out"), "a dog", "--device", "cpu"]) == 0
    rank, cosine = capsys.readouterr().out.split()[:2]
    assert rank == "1"
    assert float(cosine) > 0.999  # LLM.int8 rounds a query alone a little otherwise than in company


def test_what_cannot_be_is_refused(small, monkeypatch):
    with pytest.raises(ValueError, match="got quantize='int3', want one of int8, nf4, fp8"):
        e5v_st.load(small, device="cpu", quantize="int3")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"quantize='fp8' needs torchao: pip install 'e5v-st\[quant\]'"):
        e5v_st.load(small, device="cpu", quantize="fp8")
