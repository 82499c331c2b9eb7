"""A whole small experiment: cells, seeds, resume after kills, shared work, records, labels."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import ckf.experiment.runner
from ckf.cf import CFConfig, fit_cf
from ckf.cli import main
from ckf.data.prepared import load_prepared
from ckf.evaluate import Evaluator
from ckf.experiment import make_experiment, run_experiment
from ckf.experiment.parts import link, shared_vectors
from ckf.experiment.report import read_experiment, write_pages, write_record
from ckf.experiment.runner import _Runner
from ckf.experiment.scores import read_scores, same_rows, write_scores
from ckf.experiment.summary import summary
from ckf.metrics import auc
from ckf.run import load_run
from tests.ckf_fixtures import TASKS, quiet, read_log, settings, small_config

DOCS = Path(__file__).parent.parent / "docs"
CELLS, SEEDS, STEPS = "linear,ckf", 2, 4
QUICK = {
    "tasks": {
        "ctr": {"train": 60, "valid": 10, "test": 40},
        "topk": {"train": 20, "valid": 10, "test": 12},
    },
    "train__steps": STEPS,
    "train__save_every": 2,
    "train__batch_size": 6,
    "lora__lora_dropout": 0.0,
}


def quick(model, **changes):
    return small_config(model, **(QUICK | changes))


@pytest.fixture(scope="module")
def finished(small_model, raw_data, tmp_path_factory):
    """An experiment of two cells and two seeds, run in one go."""
    out = tmp_path_factory.mktemp("experiment") / "whole"
    experiment = make_experiment(quick(small_model), out, CELLS, SEEDS)
    run_experiment(experiment, str(raw_data), device="cpu", log=quiet)
    return experiment


@pytest.fixture(scope="module")
def found(finished):
    return read_experiment(finished.out)


def test_every_run_is_there_and_every_check_holds(finished, found):
    assert (found["runs"], found["runs_done"], found["failed"]) == (4, 4, {})
    assert set(found["cells"]) == {"linear", "ckf"}
    for cell in found["cells"].values():
        assert cell["seeds"] == [0, 1]
        assert cell["checks"] == {
            "every_adapter_trained": True,
            "vectors_reach_their_row_only": True,
        }
        assert cell["tokens_per_second"] > 0 and 0 <= cell["data_wait"] < 1
        assert [step for step, _ in cell["curves"]["loss/ctr"]] == list(range(1, STEPS + 1))
        for task, names in (("ctr", {"auc", "uauc"}), ("topk", {"hr@1", "ndcg@10", "mrr"})):
            assert set(cell["figures"][task]) == names
            for figure in cell["figures"][task].values():
                assert len(figure["seeds"]) == 2 and figure["std"] is not None
                assert figure["value"] == pytest.approx(np.mean(figure["seeds"]))


def test_the_figures_are_those_of_the_run_itself(finished, found):
    cell = finished.cells[1]
    for seed in range(SEEDS):
        run = load_run(finished.folder(cell, seed), "cpu")  # a cell's run is an ordinary run
        metrics = finished.result(cell, seed)["metrics"]
        assert run.config.seed == seed
        for task, name in (("ctr", "auc"), ("topk", "mrr")):
            one = found["cells"]["ckf"]["figures"][task][name]["seeds"][seed]
            assert one == pytest.approx(metrics[task][name]["value"])


def test_cells_share_data_vectors_and_prompts(finished):
    folders = [finished.folder(c, s) for c, s in finished.runs()]
    for name in ("data", "cf.safetensors"):
        assert len({(f / name).resolve() for f in folders}) == 1
        assert all(not (f / name).readlink().is_absolute() for f in folders)
    assert len(list((finished.out / "cf").glob("*.safetensors"))) == 1
    assert len(list((finished.out / "prompts").iterdir())) == 1


def test_a_finished_experiment_trains_nothing_again(finished, monkeypatch):
    monkeypatch.setattr(ckf.experiment.runner, "train_or_load", None)
    before = read_experiment(finished.out)
    run_experiment(finished, device="cpu", log=quiet)
    assert read_experiment(finished.out) == before


def same_results(a, b):
    for cell, seed in a.runs():
        for name in ("scores-test.safetensors", "metanet.safetensors"):
            ours, theirs = a.folder(cell, seed) / name, b.folder(cell, seed) / name
            assert ours.read_bytes() == theirs.read_bytes(), (cell.name, seed, name)


@pytest.mark.parametrize("place", ["between cells", "inside a cell", "while evaluating"])
def test_a_killed_experiment_goes_on_to_the_same_bits(
    finished, small_model, raw_data, tmp_path, monkeypatch, place
):
    out = tmp_path / "killed"
    experiment = make_experiment(quick(small_model), out, CELLS, SEEDS)
    trained, stop = [], {"between cells": 2, "inside a cell": 1, "while evaluating": 1}[place]
    plain = ckf.experiment.runner.train_or_load

    def train(assembly, folder, *rest):
        if place == "between cells" and len(trained) == stop:
            raise KeyboardInterrupt
        trained.append(folder)
        return plain(assembly, folder, *rest)

    class Killed(ckf.train.CKFTrainer):
        def training_step(self, *args, **kwargs):
            if place == "inside a cell" and len(trained) == 2 and self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    def write(*args):
        if place == "while evaluating" and len(trained) == 2:
            raise KeyboardInterrupt
        return scores(*args)

    scores = ckf.experiment.runner.write_scores
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ckf.experiment.runner, "train_or_load", train)
        patch.setattr(ckf.experiment.runner, "write_scores", write)
        patch.setattr(ckf.train, "CKFTrainer", Killed)
        run_experiment(experiment, str(raw_data), device="cpu", log=quiet)
    done = [experiment.result(c, s) is not None for c, s in experiment.runs()]
    assert sum(done) == {"between cells": 2}.get(place, 1)
    assert not (out / "experiment.json").exists()
    lines: list[str] = []
    run_experiment(experiment, device="cpu", log=lines.append)
    assert f"4 runs, {sum(done)} of them done" in lines
    same_results(experiment, finished)
    for cell, seed in experiment.runs():
        assert [x["step"] for x in read_log(experiment.folder(cell, seed))] == [1, 2, 3, 4]


def test_a_prepared_folder_moves_to_a_machine_without_the_raw_data(
    finished, small_model, raw_data, tmp_path, monkeypatch
):
    packed, moved = tmp_path / "packed", tmp_path / "moved"
    config = quick(small_model)
    made = make_experiment(config, packed, CELLS, SEEDS)
    run_experiment(made, str(raw_data), device="cpu", prepare_only=True, log=quiet)
    assert not (packed / "cells").exists()
    monkeypatch.setattr("ckf.data.prepare.prepare", None)
    monkeypatch.setattr("ckf.experiment.parts.fit_cf", None)
    monkeypatch.setattr("ckf.experiment.prompt_cache._write", None)
    model = shutil.copytree(small_model, tmp_path / "model elsewhere")
    there = replace(config, model=replace(config.model, name=str(model)))
    experiment = make_experiment(there, moved, CELLS, SEEDS)
    run_experiment(experiment, prepared=str(packed), device="cpu", log=quiet)
    same_results(experiment, finished)


def test_a_prepared_folder_has_the_valid_prompts_that_a_prior_is_weighed_on(
    small_model, raw_data, tmp_path, monkeypatch
):
    changes = {"metanet__match": "none", "cf__blend": 2, "train__schedule": "joint"}
    config = quick(small_model, **changes)
    packed, cells = tmp_path / "packed", ["ckf-prior"]
    made = make_experiment(config, packed, cells, 1)
    run_experiment(made, str(raw_data), device="cpu", prepare_only=True, log=quiet)
    monkeypatch.setattr("ckf.experiment.prompt_cache._write", None)
    experiment = make_experiment(config, tmp_path / "moved", cells, 1)
    run_experiment(experiment, prepared=str(packed), device="cpu", log=quiet)
    figures = read_experiment(experiment.out)
    assert figures["runs_done"] == 1
    about = experiment.result(*experiment.runs()[0])["about"]
    assert figures["environment"]["torch"] == about["versions"]["torch"] == torch.__version__


def test_versions_are_those_of_the_machine_that_trained():
    trained = {"device": "H", "versions": {"python": "3.12", "torch": "2.11", "transformers": "5"}}
    found = ckf.experiment.figures._environment({"a": [{"about": trained}], "b": []})
    assert found == {"devices": ["H"], **trained["versions"]}
    old = ckf.experiment.figures._environment({"a": [{"about": {"device": "H"}}]})
    assert old["torch"] == torch.__version__


def test_a_cell_keeps_the_vectors_it_was_begun_with(tmp_path):
    """Half a training on other vectors would be neither; ``load_run`` would read the first ones."""
    cell = tmp_path / "cells" / "ckf" / "seed0"
    cell.mkdir(parents=True)
    for _ in range(2):
        link(Path("cf/mf-one.safetensors"), cell / "cf.safetensors")
    with pytest.raises(ValueError, match="begun with mf-one.*is mf-two.*remove that folder"):
        link(Path("cf/mf-two.safetensors"), cell / "cf.safetensors")


def test_another_experiments_folder_is_left_alone(finished, small_model):
    experiment = make_experiment(quick(small_model, train__lr=1e-3), finished.out, CELLS, SEEDS)
    with pytest.raises(ValueError, match="other settings"):
        run_experiment(experiment, device="cpu", log=quiet)
    assert read_experiment(finished.out)["runs_done"] == 4


def test_a_run_that_fails_is_named_and_the_others_go_on(
    small_model, finished, tmp_path, monkeypatch
):
    experiment = make_experiment(quick(small_model), tmp_path / "out", CELLS, 1)
    plain = ckf.experiment.runner.train_or_load

    def train(assembly, folder, *rest):
        if folder.parent.name == "linear":
            raise ValueError("the loss is not finite at step 3")
        return plain(assembly, folder, *rest)

    monkeypatch.setattr(ckf.experiment.runner, "train_or_load", train)
    with pytest.raises(ValueError, match=r"1 run\(s\) failed.*linear seed 0: the loss is not"):
        run_experiment(experiment, prepared=str(finished.out), device="cpu", log=quiet)
    found = read_experiment(experiment.out)
    assert set(found["cells"]) == {"ckf"} and "linear seed 0" in found["failed"]
    assert "**Failed**: linear seed 0" in (experiment.out / "experiment.md").read_text()


# ---- what is written


def test_the_record_names_auc_and_uauc_of_every_cell(finished, tmp_path):
    file = write_record(finished.out, tmp_path / "results")
    record = json.loads(file.read_text())
    assert file.name == "small.json" and record["reduced"] == []
    for cell in (*record["cells"].values(), record["baselines"]["cf"]):
        for name in ("test_ctr_auc", "test_ctr_uauc"):
            assert 0 <= cell[name]["low"] <= cell[name]["value"] <= cell[name]["high"] <= 1
    assert "/" not in record["model"]["name"]  # no path of the machine it was made on
    for cell in record["cells"].values():
        assert cell["tokens_per_second"] > 0 and 0 <= cell["data_wait"] < 1
        assert all(cell["checks"].values()) and "popularity decile" in cell["slices"]
    assert any("valid AUC" in line for lines in record["cf_fits"].values() for line in lines)
    text = summary(record, "results/small.json")
    assert "ckf: shared + task LoRA, meta-network" in text and "item_mean" in text


def test_cf_models_stand_beside_by_themselves(small_model, raw_data, tmp_path):
    config = quick(small_model, train__steps=1, cf={"dim": 4, "epochs": 3, "blend": 2})
    config = replace(config, cf=replace(config.cf, beside=["mf", "lightgcn"]))
    experiment = make_experiment(config, tmp_path / "out", "ckf-match", 1)
    run_experiment(experiment, str(raw_data), device="cpu", log=quiet)
    found = read_experiment(experiment.out)
    assert {"cf", "cf-mf", "cf-lightgcn"} <= set(found["baselines"])
    assert set(found["cf"]) == {"mf-blend", "mf", "lightgcn"}
    own, alone = (found["baselines"][n]["figures"]["ctr"]["auc"]["value"] for n in ("cf", "cf-mf"))
    assert own != alone
    plain = replace(config, cf=replace(config.cf, blend=0, beside=["mf"]))
    experiment = make_experiment(plain, tmp_path / "plain", "ckf", 1)
    data = load_prepared(tmp_path / "out" / "data")
    assert list(_Runner(experiment, data, data, None, quiet).vector_files()) == ["mf"]


def test_the_cf_row_is_the_configs_own_model(finished, small_model, tmp_path, monkeypatch):
    """Another LightGCN among the cells must not take the place of the config's."""
    fitted = []

    def quick_fit(cf, data, log, titles=None):
        fitted.append((cf.kind, cf.dim))
        return fit_cf(CFConfig(dim=2, epochs=1), data, log)

    monkeypatch.setattr("ckf.experiment.parts.fit_cf", quick_fit)
    config = quick(small_model, cf={"kind": "lightgcn", "dim": 4, "beside": ["lightgcn", "mf"]})
    experiment = make_experiment(config, tmp_path, "ckf,ckf-lightgcn", 1)
    data = load_prepared(finished.out / "data")
    files = _Runner(experiment, data, data, None, quiet).vector_files()
    widths = [8, 16, 32, 64, 128, 256]
    assert [name for name, _ in fitted] == ["lightgcn", "lightgcn", "mf"]  # none of them twice
    assert fitted[0][1] == 4 and fitted[1][1] == widths
    assert list(files) == ["lightgcn", "lightgcn-2", "mf"]
    own = shared_vectors(config, tmp_path, data, None, quiet)
    assert files["lightgcn"] == own and len(set(files.values())) == 3


def test_a_cell_with_a_prior_stands_beside_the_prior(small_model, raw_data, tmp_path):
    changes = {"train__steps": 2, "train__save_every": 1, "train__schedule": "joint"}
    config = quick(small_model, **changes, cf={"dim": 4, "epochs": 3, "blend": 2})
    experiment = make_experiment(config, tmp_path / "out", "ckf-match,ckf-prior", 1)
    run_experiment(experiment, str(raw_data), device="cpu", log=quiet)
    found = read_experiment(experiment.out)
    assert not found["failed"] and "prior" in found["baselines"]
    pairs = {(c["a"], c["b"]) for c in found["comparisons"]}
    assert {("ckf-prior", "ckf-match"), ("ckf-prior", "prior")} <= pairs
    run = load_run(experiment.folder(experiment.cells[1], 0), "cpu")
    users, items = run.assembly.data.user_ids, run.assembly.data.item_ids
    known, stranger = run.predict(
        [
            {"task": "topk", "user": users[0], "candidates": list(items[:5])},
            {"task": "ctr", "user": "new", "item": items[0], "history": list(items[1:3])},
        ]
    )
    assert np.isfinite(known["scores"]).all() and len(known["scores"]) == 5
    assert np.isfinite(stranger["score"])


def test_the_page_loads_nothing_and_says_what_it_compares(finished):
    text = write_pages(finished.out).read_text()
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    for words in ("linear", "ckf", "Paired differences", "popularity decile", "Waiting", "waiting"):
        assert words.lower() in text.lower()
    assert "reduced" not in text.lower()


def test_reduced_figures_are_labelled_everywhere(small_model, raw_data, tmp_path):
    config = quick(
        small_model, train__steps=400, data__test_lists=["uniform9", "uniform19"],
        tasks={"ctr": {"train": 60, "valid": 10}},
    )  # fmt: skip
    config = replace(config, data=replace(config.data, test_lists=["uniform9"]))
    experiment = make_experiment(config, tmp_path / "out", "linear", 3, is_reduced=True)
    small = experiment.config
    assert (experiment.seeds, small.train.steps, small.model.layers) == (1, 80, 4)
    assert "training steps 80 instead of 400" in experiment.cut
    assert "1 seed instead of 3" in experiment.cut
    quicker = replace(small.train, steps=2)
    layers = replace(small.model, layers=1)
    experiment.config = replace(small, train=quicker, model=layers)
    run_experiment(experiment, str(raw_data), device="cpu", log=quiet)
    found = read_experiment(experiment.out)
    assert found["name"] == "small-reduced" and found["reduced"] == experiment.cut
    text = (experiment.out / "experiment.md").read_text()
    assert "**REDUCED**" in text and "AUC (reduced)" in text and "A - B (reduced)" in text
    assert "popularity decile (reduced)" in text
    page = (experiment.out / "experiment.html").read_text()
    assert "REDUCED" in page and "AUC (reduced)" in page
    record = json.loads(write_record(experiment.out, tmp_path / "r").read_text())
    assert record["reduced"] == experiment.cut
    assert finished_reduced(experiment) == experiment.cut


def finished_reduced(experiment):
    return experiment.result(*experiment.runs()[0])["reduced"]


def test_the_command_line(small_model, raw_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings(small_model, **QUICK)))
    command = ["experiment", "small.yaml", "--data", str(raw_data), "--device", "cpu"]
    assert main([*command, "--cells", "text", "--seeds", "1", "--valid"]) == 0
    out = tmp_path / "runs" / "experiment-small"
    assert read_experiment(out)["split"] == "valid"
    assert not (out / "cells" / "text" / "seed0" / "result-test.json").exists()
    assert main([*command, "--cells", "text", "--seeds", "1"]) == 0  # trained already
    assert main(["report", str(out), "--record", "records"]) == 0
    assert (tmp_path / "records" / "small.json").exists()
    capsys.readouterr()
    assert main([*command, "--cells", "ckff"]) == 2
    assert "no cell is named 'ckff'; known: main, full, text" in capsys.readouterr().err
    assert main([*command, "--seeds", "0"]) == 2


def test_torch_is_what_the_page_says(found):
    assert found["environment"]["torch"] == torch.__version__


# ---- the documented way to bring vectors of a sequence model


def test_vectors_of_a_sequence_model_train_as_documented(
    finished, small_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.out / "data", tmp_path / "bundle" / "data")
    text = (DOCS / "experiments.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    files = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["cf"]
    data = load_run(finished.folder(finished.cells[0], 0), "cpu").assembly.data
    train = np.flatnonzero((data.split == 0) & (data.label == 1))
    table = np.random.default_rng(0).normal(size=(data.n_items, 5)).astype(np.float32)
    seen, left_out = [], []

    def fit(rows):
        """A state that the last item sways the most, as a sequence model's."""
        left_out.append(set(train) - set(rows))

        def encode(items):
            seen.append(items)
            return 0.5 ** np.arange(len(items))[::-1] @ table[items]

        return encode, table

    exec(compile(code, "docs/experiments.md", "exec"), {"fit": fit})
    whole = np.concatenate(seen)[: len(train)]
    assert whole.tolist() == data.item[train].tolist()  # train rows only, in order
    assert left_out[0] == set() and set().union(*left_out) == set(train)
    assert sum(map(len, left_out)) == len(train)
    changes = {"metanet__match": "score", "train__schedule": "joint"}
    experiment = make_experiment(
        quick(small_model, cf=files, **changes), tmp_path / "out", "ckf,ckf-match,ckf-prior", 1
    )
    run_experiment(experiment, prepared="bundle/data", device="cpu", log=quiet)
    found = read_experiment(experiment.out)
    assert found["runs_done"] == 3 and found["cf"]["file-blend"]["sha256"]
    plain = {name: files[name] for name in ("kind", "users", "items")}
    user, item = int(data.user[train[0]]), int(data.item[0])
    own = fit_cf(CFConfig(**plain), data, quiet).score([user], [item])
    by_hand = np.load("users.npy")[user] @ np.load("items.npy")[item]
    assert float(own[0]) == pytest.approx(float(by_hand), rel=1e-5)


# ---- scores of every task


def test_scores_of_all_tasks_come_back_with_the_figures_of_the_evaluation(small_run, tmp_path):
    found = {task: Evaluator(small_run.assembly, "test").task(task) for task in TASKS}
    write_scores({task: f.predictions for task, f in found.items()}, tmp_path / "scores")
    scores = read_scores(tmp_path / "scores")
    assert set(scores) == set(TASKS)
    data = small_run.assembly.data
    for task, own in scores.items():
        assert own.rows.tolist() == data.rows(task, "test").tolist()
        for name, statistic in own.statistics(data).items():
            value = float(statistic(np.ones((1, len(own.rows))))[0])
            assert value == pytest.approx(found[task].metrics[name]["value"]), (task, name)
    half = np.arange(len(scores["ctr"].rows)) % 2 == 0
    part = scores["ctr"].statistics(data, half)["auc"](np.ones((1, int(half.sum()))))
    rows = scores["ctr"].rows[half]
    assert float(part[0]) == pytest.approx(
        auc(scores["ctr"].arrays["score"][half], data.label[rows])
    )
    with pytest.raises(ValueError, match="different ctr rows"):
        same_rows(scores["ctr"], replace(scores["ctr"], rows=rows))
    (tmp_path / "scores").write_bytes(b"cut")
    with pytest.raises(ValueError, match="missing or damaged"):
        read_scores(tmp_path / "scores")
