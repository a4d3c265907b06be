"""Loading and exporting weights: every format, malicious and truncated files, configs that don't fit."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from test_simple import config_of, random_model

from hnet_runtime import UserError
from hnet_runtime.runs import checkpoint as own
from hnet_runtime.runs import run_folder, weights
from hnet_runtime.runs.weights import (
    Checkpoint,
    CheckpointError,
    cast,
    checkpoint_of,
    export,
    load,
    load_inference,
    load_training,
)
from hnet_simple import HNetInference
from hnet_trainable import HNetLM

OMEGACONF = Path(__file__).parent / "omegaconf.pt"


@pytest.fixture(scope="module")
def model() -> HNetLM:
    return random_model(config_of(["m1t1", ["T1"], "M1"], [32, 64], window_size=[20, -1]), torch.float32)


def own_checkpoint(folder: Path, model: HNetLM) -> Path:
    """What train.py leaves, as far as loading is concerned: keys under `model.`, an optimizer, config.json."""
    import json

    state = {"model": model.state_dict(), "optimizer": {"state.step": torch.tensor(3.0), "lr": 0.1}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    manifest = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("tied", [False, True])
def test_export_and_load(tmp_path, form, tied):
    model = random_model(
        config_of(["m1", ["T1"], "M1"], [32, 64], tie_embeddings=tied, N_compress=[1, 5]), torch.float32
    )
    files = export(model, tmp_path / "out", form)
    assert [file.name for file in files][:2] == [f"model.{form}", "config.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(file.name for file in files)
    for source in (tmp_path / "out", files[0]):
        got = load(source)
        assert same(got.weights, model.state_dict())
        assert got.config == model.config
    lm = load_inference(tmp_path / "out")
    assert (lm.lm_head.weight is lm.embeddings.weight) == tied
    theirs = HNetInference.from_training(model).prefill([b"\xfeabc"]).logits_BLV
    assert torch.equal(lm.prefill([b"\xfeabc"]).logits_BLV, theirs)
    assert same(load_training(tmp_path / "out").state_dict(), model.state_dict())


def test_exported_pt_is_the_official_form(tmp_path, model):
    """A plain state dict under plain torch.load, and a config.json with only the keys that the released code takes."""
    import json

    export(model, tmp_path, "pt", torch.bfloat16)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(state) == list(model.state_dict()) and type(state) is dict
    assert state["backbone.encoder.layers.0.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert state["backbone.encoder.layers.0.mixer.A_log"].dtype == torch.float32
    official = "arch_layout d_model d_intermediate vocab_size ssm_cfg attn_cfg tie_embeddings"
    assert set(json.loads((tmp_path / "config.json").read_text())) == set(official.split())


def test_a_default_target_compression_is_named(tmp_path, caplog):
    """Weights whose config is for the released code alone; a config that is given; one that is given without it."""
    model = random_model(config_of(["m1", ["T1"], "M1"], [32, 64], N_compress=[1, 5]), torch.float32)
    weights, official, whole = export(model, tmp_path, "pt")
    caplog.set_level("INFO", "hnet")
    assert load(weights).config.N_compress == load(weights, official).config.N_compress == (1, 5)
    assert caplog.messages == []
    whole.rename(tmp_path / "named.json")
    assert load(weights, N_compress=[1, 4]).config.N_compress == (1, 4)
    assert load(weights, tmp_path / "named.json").config.N_compress == (1, 5)
    assert caplog.messages == []
    assert load(weights).config.N_compress == (1, 6)
    (said,) = caplog.messages
    assert str(official) in said and "N_compress" in said and "1-6" in said


def test_own_checkpoint(tmp_path, model):
    folder = own_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000450", model)
    (tmp_path / "run" / "checkpoints" / "step_00000900.writing").mkdir()
    for source in (folder, tmp_path / "run"):
        assert same(load(source).weights, model.state_dict())
        assert load(source).config == model.config


def test_a_newer_checkpoint_that_is_damaged_is_named(tmp_path, model, caplog):
    run = tmp_path / "run"
    own_checkpoint(run / "checkpoints" / "step_00000450", model)
    torn = own_checkpoint(run / "checkpoints" / "step_00000900", model)
    load(run)
    assert "skipped" not in caplog.text and checkpoint_of(run) == str(torn)
    next(torn.glob("*.distcp")).write_bytes(b"torn")
    assert same(load(run).weights, model.state_dict())
    assert f"skipped {torn}: damaged or incomplete; step_00000450 is read" in caplog.text
    assert checkpoint_of(str(run)).endswith("step_00000450") and checkpoint_of("hf:a/b") == "hf:a/b"


def test_an_export_knows_the_files_that_trained_it(tmp_path, model, monkeypatch, caplog):
    """Also one that another version of them exports again."""
    code = own.model_code()
    export(model, tmp_path / "first", "safetensors")
    load(tmp_path / "first")
    assert caplog.messages == []
    monkeypatch.setattr(run_folder, "model_code", lambda: code | {"hnet_trainable.py": "0" * 12})
    export(load(tmp_path / "first"), tmp_path / "second", "safetensors")
    load(tmp_path / "second")
    said = f"hnet_trainable.py (fingerprint {code['hnet_trainable.py']}, here 000000000000): what follows"
    for folder, message in zip(("first", "second"), caplog.messages, strict=True):
        assert f"{tmp_path / folder / 'model.safetensors'} was written with another {said}" in message
    save_file(model.state_dict(), tmp_path / "first" / "model.safetensors", metadata={"model_code.hnet_kernels": "?"})
    assert load(tmp_path / "first").model_code == {} and len(caplog.messages) == 2


def test_an_export_replaces_no_config_of_another(tmp_path, model):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match="has a config.json that is of no export"):
        export(model, tmp_path, "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    for _ in range(2):  # an export may be made again
        export(model, tmp_path / "new", "safetensors")


@pytest.mark.parametrize("name, content", [("model.py", ""), ("model.safetensors", "theirs")])
def test_a_file_named_model_makes_no_export(tmp_path, model, name, content):
    """Code for a model, or the weights of another one."""
    mine = {"config.json": '{"model_type": "llama"}', name: content}
    for file, text in mine.items():
        (tmp_path / file).write_text(text)
    for form in ("safetensors", "pt"):
        with pytest.raises(CheckpointError, match="has a config.json that is of no export"):
            export(model, tmp_path, form)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == mine


def test_omegaconf_is_not_needed():
    """tests/omegaconf.pt was written by torch.save with omegaconf 2.4.0: a ListConfig and a DictConfig beside a
    tensor, and one in the state dict's metadata."""
    assert "omegaconf" not in sys.modules
    read = weights._load_pt(OMEGACONF)
    assert list(read) == ["embeddings.weight"] and read["embeddings.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(pickle.UnpicklingError):  # the file does need the allow-list
        torch.load(OMEGACONF, weights_only=True)


def test_nested_and_prefixed_state_dicts(tmp_path, model):
    state = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    state["module._orig_mod.backbone.encoder.layers.1.mixer.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save({"model": state, "step": 3}, tmp_path / "wrapped.pt")
    assert same(load(tmp_path / "wrapped.pt", model.config).weights, model.state_dict())


def test_official_names_find_their_config(tmp_path, monkeypatch):
    """`hnet_1stage_L.pt` comes alone: its config is in configs/."""
    (tmp_path / "configs").mkdir()
    small = random_model(config_of(["m1"], [32]), torch.float32)
    export(small, tmp_path / "configs", "safetensors")
    (tmp_path / "configs" / "config.json").rename(tmp_path / "configs" / "hnet_mini.json")
    monkeypatch.setattr(weights, "CONFIGS", tmp_path / "configs")
    torch.save(small.state_dict(), tmp_path / "hnet_mini.pt")
    assert load(tmp_path / "hnet_mini.pt").config == small.config


def test_cast_keeps_what_must_be_precise(model):
    low = cast(model.state_dict(), torch.bfloat16)
    precise = {name for name, tensor in low.items() if tensor.dtype == torch.float32}
    assert precise == {n for n in low if n.endswith(("A_log", "dt_bias", "mixer.D")) or "residual_proj" in n}
    assert {t.dtype for t in cast(model.state_dict(), torch.float64).values()} == {torch.float64}


# ------------------------------------------------------------------------------------------------------ files that lie


class Bomb:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malicious_pickle_does_not_run(tmp_path, model):
    marker = tmp_path / "was here"
    torch.save({**model.state_dict(), "x": Bomb(marker)}, tmp_path / "bomb.pt")
    for protocol in (2, 4):
        (tmp_path / f"plain{protocol}.pt").write_bytes(pickle.dumps({"x": Bomb(marker)}, protocol=protocol))
    for name in ("bomb.pt", "plain2.pt"):
        with pytest.raises(CheckpointError, match=r"refused, because it holds more than weights \(posix.mkdir\)"):
            load(tmp_path / name, model.config)
    with pytest.raises(CheckpointError, match="not a file of weights"):
        load(tmp_path / "plain4.pt", model.config)
    assert not marker.exists()
    with pytest.raises(FileNotFoundError):  # the bomb is real
        pickle.loads(pickle.dumps(Bomb(tmp_path / "no" / "such")))


def test_allowed_names_cannot_be_misused(tmp_path, model):
    """What stands in for OmegaConf and builtins takes anything and does nothing."""

    class Call:
        def __reduce__(self):
            import collections

            return collections.defaultdict, (list,)

    torch.save({"x": Call(), **model.state_dict()}, tmp_path / "calls.pt")
    assert same(load(tmp_path / "calls.pt", model.config).weights, model.state_dict())


def test_malicious_index_does_not_run(tmp_path, model):
    """torch opens `.metadata` of its checkpoints with the full pickle module; we do not."""
    folder = own_checkpoint(tmp_path / "step", model)
    marker = tmp_path / "was here"
    (folder / "manifest.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(CheckpointError, match=r"holds more than weights \(posix.mkdir\)"):
        load(folder)
    assert not marker.exists()


# ----------------------------------------------------------------------------------------------- files that are broken


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600 and isinstance(error.value, UserError)
    return text


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated(tmp_path, model, form, share):
    file = export(model, tmp_path, form)[0]
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError) as error:
        load(file)
    assert "damaged or cut short" in sentence(error) or "not a file of weights" in sentence(error)
    assert file.name in sentence(error)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, model, form):
    file = export(model, tmp_path, form)[0]
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert sentence(error) == f"{file}: can't be read (Too many levels of symbolic links)"


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata"])
def test_truncated_own_checkpoint(tmp_path, model, victim):
    folder = own_checkpoint(tmp_path / "step", model)
    data = (folder / victim).read_bytes()
    (folder / victim).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="not those of manifest.json") as error:
        load(folder)
    sentence(error)
    (folder / "manifest.json").unlink()  # as if it had never had one
    with pytest.raises(CheckpointError, match="damaged or incomplete") as error:
        load(folder)
    sentence(error)


def test_random_bytes_are_no_weights(tmp_path, model):
    generator = torch.Generator().manual_seed(0)
    for n in range(30):
        data = bytes(torch.randint(256, (n * 20,), generator=generator).tolist())
        for suffix in ("pt", "safetensors"):
            (tmp_path / f"junk.{suffix}").write_bytes(data)
            with pytest.raises(CheckpointError) as error:
                load(tmp_path / f"junk.{suffix}", model.config)
            sentence(error)


def test_a_config_that_differs_is_named(tmp_path, model):
    file = export(model, tmp_path, "safetensors")[0]
    other = config_of(["m1t1", ["T1"], "M1"], [32, 96], window_size=[21, -1])
    with pytest.raises(CheckpointError) as error:
        load(file, other)
    assert "d_model is [32, 64] there, [32, 96] in the one given" in sentence(error)
    assert "attn_cfg.window_size is [20, -1] there, [21, -1]" in sentence(error)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError) as error:
        load(file, other)
    assert "d_model is [32, 64] in the weights, [32, 96] in the config" in sentence(error)
    deeper = config_of(["m1t1", ["T2"], "M1"], [32, 64], d_intermediate=[48, 200])
    with pytest.raises(CheckpointError) as error:
        load(file, deeper)
    assert "arch_layout is ['m1t1', ['T1'], 'M1'] in the weights" in sentence(error)
    assert "d_intermediate is [128, 128] in the weights, [128, 256] in the config" in sentence(error)
    assert load(file, config_of(["m1t1", ["T1"], "M1"], [32, 64], N_compress=[1, 9])).config.N_compress == (1, 9)
    with pytest.raises(CheckpointError, match="no config.json beside the weights"):
        load(file)


def test_missing_and_unknown_names(tmp_path, model):
    state = dict(model.state_dict())
    state["extra"] = state.pop("backbone.encoder.layers.0.mixer.D")
    state["backbone.encoder.layers.0.mixer.conv1d.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "odd.pt", model.config)
    assert "1 missing (backbone.encoder.layers.0.mixer.D); 1 unknown (extra); 1 of another shape" in sentence(error)
    torch.save({"epoch": 3}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path / "odd.pt", model.config)
    torch.save([1, 2], tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="holds list, expected a state dict"):
        load(tmp_path / "odd.pt", model.config)


def test_sources_that_are_none(tmp_path, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / "two" / f"{name}.safetensors")
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "bad").mkdir()
    export(model, tmp_path / "bad", "safetensors")
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "other"}')
    for source, words in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty", "holds no checkpoint"),
        (tmp_path / "notes.txt", "expected a .pt or .safetensors file"),
        (tmp_path / "two", "holds 2 weight files (a.safetensors, b.safetensors); name one of them"),
        (tmp_path / "run", "holds no complete checkpoint (step_00000001 is damaged or incomplete)"),
        (tmp_path / "bad", "unknown key model_type"),
        ("hf:no-slash", "expected hf:owner/name"),
        ("hf:../../etc", "expected hf:owner/name"),
    ):
        with pytest.raises(CheckpointError) as error:
            load(source)
        assert words in sentence(error)


def test_hub(tmp_path, model, monkeypatch):
    """Without a network: what the Hub's client answers and raises, turned into one sentence each."""
    import huggingface_hub
    from huggingface_hub import errors

    export(model, tmp_path, "safetensors")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(tmp_path)
    )
    assert same(load("hf:some-one/hnet.small").weights, model.state_dict())
    assert asked == ["some-one/hnet.small"]

    def raising(error):
        def download(*args, **options):
            raise error

        return download

    class NotFound(errors.RepositoryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404")

    for error, words in (
        (NotFound(), "the Hub has no such repository, or it is private"),
        (errors.LocalEntryNotFoundError("x"), "the Hub can't be reached"),
        (ConnectionError("no route\nto host"), r"could not be fetched \(no route\)"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
        with pytest.raises(CheckpointError, match=words) as caught:
            load("hf:some-one/hnet")
        sentence(caught)


def test_nothing_half_written_keeps_its_name(tmp_path, model, monkeypatch):
    import safetensors.torch

    def fails(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export(Checkpoint(model.config, model.state_dict()), tmp_path, "safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected pt or safetensors"):
        export(model, tmp_path, "onnx")
