"""The full UnED: its layout, its counts, its presets, and the notebooks on a tree of exactly its form."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pandas as pd
import pytest
import yaml

from tests import PROJECT
from tests.helpers.notebookfiles import PLOTLY, SHEET, outputs, papermill, text
from tests.helpers.uned_tree import CLASSES, SHELVES, info_files, write_uned_tree
from udonlib import presets, runs
from udonlib.data.catalog import Catalog, DataError, Domain, Split, check_images, load_catalog
from udonlib.data.check import uned
from udonlib.data.images import ImageReader
from udonlib.data.packing import pack
from udonlib.data.storage import Store
from udonlib.models.backbones import create_backbone

ORDER = ("food2k", "cars", "sop", "inshop", "inat", "met", "gldv2", "rp2k")
# What makes a preset of days one of seconds.
TINY = {
    "backbone": "small_resnet",
    "backbone_args": {"width": 8},
    "pretrained": False,
    "image_size": 32,
    "resize_size": 36,
    "batch_size": 8,
    "steps": 24,
    "frozen_steps": 4,
    "update_every": 8,
    "eval_every": 12,
    "log_every": 4,
    "checkpoint_every": 8,
    "n_workers": 0,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_uned_tree(tmp_path_factory.mktemp("data") / "uned")


@pytest.fixture(scope="module")
def catalog(tree: Path) -> Catalog:
    return load_catalog(str(tree))


def zipped(folder: Path, to: Path) -> Path:
    """Pack a tree as any archiver does, escaped names and all."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(folder.parent if folder.name == "info_files" else folder).as_posix())
    return to


def all_paths(catalog: Catalog) -> set[str]:
    return {path for domain in catalog.domains for split in domain.splits.values() for path in split.paths}


class TestLayout:
    def test_domains_come_in_the_order_of_the_recipe(self, catalog: Catalog) -> None:
        assert catalog.names == ORDER == tuple(uned.OFFICIAL)

    def test_images_lie_where_the_benchmark_has_them(self, tree: Path) -> None:
        folders = "cars/car_ims food2k/Food2k_complete gldv2/images/index gldv2/images/test gldv2/images/train"
        folders += " inat/iNaturalist/train_val2018 deepfashion/inshop/img met/MET met/test_met rp2k/all/test"
        folders += " rp2k/all/train sop/chair_final"
        assert [folder for folder in folders.split() if not (tree / "images" / folder).is_dir()] == []

    def test_queries_search_the_split_that_the_benchmark_gives_them(self, catalog: Catalog) -> None:
        searched = {
            (domain.name, subset): domain.index(subset).name
            for domain in catalog.domains
            for subset in ("val", "test")
            if domain.index(subset) is not domain.queries(subset)
        }
        assert searched == {
            ("met", "val"): "small_index",
            ("met", "test"): "index",
            ("gldv2", "test"): "index",
            ("inshop", "test"): "index",
        }

    def test_mets_index_is_its_train_split_with_labels_in_lists(self, catalog: Catalog) -> None:
        met = catalog["met"].splits
        assert met["index"].paths == met["train"].paths
        assert set(met["small_index"].paths) < set(met["train"].paths)
        assert np.array_equal(met["index"].labels, met["train"].labels)
        assert catalog["met"].n_classes == 12

    def test_a_query_may_show_several_landmarks(self, catalog: Catalog) -> None:
        assert catalog["gldv2"].splits["test"].labels.tolist() == [[5, 6], [5, -1], [6, -1], [7, -1]]

    def test_every_image_is_there_and_no_other_file(self, tree: Path, catalog: Catalog) -> None:
        assert check_images(catalog) == sum(path.is_file() for path in (tree / "images").rglob("*")) == 212

    def test_info_files_and_images_may_come_apart_as_they_are_downloaded(
        self, tree: Path, catalog: Catalog, tmp_path: Path
    ) -> None:
        info = zipped(tree / "info_files", tmp_path / "info_files.zip")
        for images in (tree, tree / "images"):
            apart = load_catalog(str(info), images=str(images))
            assert apart.fingerprint == catalog.fingerprint
            assert check_images(apart) == 212

    def test_the_folder_info_files_itself_is_refused_with_a_hint(self, tree: Path) -> None:
        with pytest.raises(
            DataError, match=r"'data': .*info_files holds <domain>/train\.json itself; expected the fol"
        ):
            load_catalog(str(tree / "info_files"))


class TestEscapedNames:
    @pytest.fixture
    def names(self, catalog: Catalog) -> list[str]:
        return sorted(path for path in all_paths(catalog) if path.startswith("rp2k/") and not path.isascii())

    def test_the_tree_has_names_of_both_kinds(self, tree: Path, names: list[str]) -> None:
        present = [name for name in names if (tree / "images" / name).exists()]
        assert present == [name for name in names if SHELVES[0] in name]
        assert 0 < len(present) < len(names)
        assert (tree / "images/rp2k/all/train/Caf#U00e9 500ml").is_dir()
        assert (tree / "images/rp2k/all/train/#U5965#U5229#U5965_#L01f600").is_dir()

    def test_they_are_found_in_a_folder_in_an_archive_of_it_and_in_a_pack(
        self, tree: Path, catalog: Catalog, names: list[str], tmp_path: Path
    ) -> None:
        pack(catalog, tmp_path / "packed.zip")
        for data in (zipped(tree, tmp_path / "escaped.zip"), tmp_path / "packed.zip"):
            other = load_catalog(str(data))
            assert other.fingerprint == catalog.fingerprint
            assert check_images(other) == 212
            assert [other.store.read(name) for name in names] == [catalog.store.read(name) for name in names]
        kept = zipfile.ZipFile(tmp_path / "packed.zip").namelist()
        assert {f"images/{name}" for name in names} <= set(kept)  # under their own names, once and for all
        assert not [name for name in kept if "#U" in name or "#L" in name]

    def test_one_that_is_missing_under_both_names_is_named_as_the_info_file_does(
        self, tree: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(tree, tmp_path / "copy"))
        os.remove(copy / "images/rp2k/all/train/Caf#U00e9 500ml/0_train.jpg")
        with pytest.raises(
            DataError, match=r"rp2k: 1 of 24 images missing, first 'rp2k/all/train/Café 500ml/0_train\.jpg'"
        ):
            check_images(load_catalog(str(copy)))


@pytest.mark.parametrize("short_side", [None, 24])
def test_every_image_is_decoded_from_the_folder_and_from_its_pack(
    catalog: Catalog, tmp_path: Path, short_side: int | None
) -> None:
    assert pack(catalog, tmp_path / "packed.zip", short_side, n_workers=2) == {}
    packed = load_catalog(str(tmp_path / "packed.zip"))
    here, there = (ImageReader(c, 32, "eval", cache=False) for c in (catalog, packed))
    for domain in catalog.domains:
        for name, split in domain.splits.items():
            one, other = (reader.read(domain.name, name, np.arange(len(split))).float() for reader in (here, there))
            assert one.std() > 10
            difference = (one - other).abs().mean()
            assert difference == 0 if short_side is None else 0 < difference < 20


class TestCounts:
    def test_the_table_sums_to_the_benchmarks_totals(self) -> None:
        counts = uned.OFFICIAL.values()
        assert sum(c.train for c in counts) == 2_831_222
        assert sum(c.train_classes for c in counts) == 316_446
        assert sum(c.test for c in counts) == 241_986
        assert sum(c.test_index for c in counts) == 1_397_126
        assert {name: c.val_index for name, c in uned.OFFICIAL.items() if c.val_index != c.val} == {"met": 38_307}

    def test_a_part_is_counted_domain_by_domain_and_shown_to_differ(self, catalog: Catalog) -> None:
        table = uned.check_counts(catalog)
        assert tuple(table.index) == (*ORDER, "all")
        assert set(table["verdict"]) == {"⚠ differs"}
        for domain, (train, val, test) in CLASSES.items():
            official, row = uned.OFFICIAL[domain], table.loc[domain]
            assert row["train"] == f"{sum(train)} of {official.train:,}"
            assert row["train classes"] == f"{len(train)} of {official.train_classes:,}"
            assert row["val"] == f"{sum(val)} of {official.val:,}"
            assert row["test"] == f"{sum(test)} of {official.test:,}"
        assert table["index"].to_dict() == {
            **dict.fromkeys(ORDER, "–"),
            "inshop": "5 of 12,612",
            "met": "13 of 397,121",
            "gldv2": "19 of 761,757",
            "all": "37 of 1,171,490",
        }
        assert table.loc["met", "small_index"] == "5 of 38,307"
        assert table.loc["all", "train"] == "97 of 2,831,222"

    def test_domains_left_out_are_absent_and_strangers_do_not_count(self, tree: Path) -> None:
        verdicts = uned.check_counts(load_catalog(str(tree), "rp2k, met"))["verdict"].to_dict()
        assert verdicts == {
            **dict.fromkeys(ORDER, "absent"),
            "met": "⚠ differs",
            "rp2k": "⚠ differs",
            "all": "⚠ differs",
        }
        assert uned.check_counts(load_catalog("miniuned", "emoji, flags")) is None

    def test_the_official_counts_are_recognised_and_one_image_too_few_is_seen(self, tmp_path: Path) -> None:
        def domain(name: str, missing: int) -> Domain:
            c = uned.OFFICIAL[name]
            sizes = {"train": c.train, "val": c.val, "test": c.test - missing, "index": c.index}
            sizes["small_index"] = c.small_index
            labels = {split: np.arange(n, dtype=np.int64)[:, None] % c.train_classes for split, n in sizes.items()}
            splits = {split: Split(split, ("",) * n, labels[split]) for split, n in sizes.items() if n}
            return Domain(name, splits)

        def table(missing: int) -> pd.DataFrame:
            domains = tuple(domain(name, missing if name == "sop" else 0) for name in ORDER)
            return uned.check_counts(Catalog("uned", tmp_path, domains, Store(tmp_path)))

        whole = table(0)
        assert set(whole["verdict"]) == {"as published"}
        assert whole.loc["all"].tolist()[:4] == ["2,831,222", "316,446", "293,409", "241,986"]
        short = table(1)
        assert {name for name, verdict in short["verdict"].items() if verdict == "⚠ differs"} == {"sop", "all"}
        assert short.loc["sop", "test"] == "60,501 of 60,502"


class TestPresets:
    def test_the_papers_recipe_is_changed_in_nothing_but_where_the_data_is(self) -> None:
        paper, preset = (presets.load(name).model_dump() for name in ("paper", "uned_in21k"))
        assert {name for name in paper if paper[name] != preset[name]} == {"data", "n_workers"}

    def test_epochs_are_those_of_the_papers(self) -> None:
        udon, baseline = presets.load("uned_in21k"), presets.load("uned_us_rr")
        epoch = sum(c.train for c in uned.OFFICIAL.values()) // udon.batch_size
        assert (udon.steps, baseline.steps) == (10 * epoch, 7 * epoch)
        for params in (udon, baseline):
            assert (params.frozen_steps, params.eval_every, params.batch_size) == (2 * epoch, epoch, 128)

    @pytest.mark.parametrize("recipe", ["us_rr", "us_ds", "uj_rr", "uj_ds"])
    def test_the_baselines_differ_in_their_recipe_alone(self, recipe: str) -> None:
        params = presets.load(f"uned_{recipe}")
        assert params.recipe == recipe
        assert params == presets.load("uned_us_rr", recipe=recipe)
        assert not params.has_teachers

    def test_fixed_shares_are_of_all_domains_and_in_proportion(self) -> None:
        shares = presets.load("uned_fixed_shares").fixed_shares
        assert tuple(shares) == ORDER
        assert shares["gldv2"] / shares["cars"] == pytest.approx(66_696 / 539)

    def test_clip_is_normalised_by_its_own_statistics(self) -> None:
        params = presets.load("uned_clip")
        backbone = create_backbone(params.backbone, pretrained=False, image_size=224, arguments={"depth": 1})
        assert backbone.feature_dim == 768
        assert np.allclose(backbone.mean, (0.48145466, 0.4578275, 0.40821073), atol=1e-7)
        assert np.allclose(backbone.std, (0.26862954, 0.26130258, 0.27577711), atol=1e-7)
        in21k = create_backbone(
            presets.load("uned_in21k").backbone, pretrained=False, image_size=224, arguments={"depth": 1}
        )
        assert (in21k.mean, in21k.std) == ((0.5,) * 3, (0.5,) * 3)

    def test_without_the_data_nothing_is_trained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        params = presets.load("uned_in21k", **TINY, outputs=str(tmp_path / "results"))
        with pytest.raises(DataError, match=r"parameter 'data': no folder or archive '.*uned\.zip'"):
            runs.open_run(params)
        assert not (tmp_path / "results").exists()


class TestTraining:
    @pytest.mark.parametrize("preset", ["uned_fixed_shares", "uned_us_rr", "uned_uj_ds"])
    def test_a_preset_trains_on_all_domains_and_is_tested_by_the_protocol(
        self, tree: Path, tmp_path: Path, preset: str
    ) -> None:
        run = runs.open_run(presets.load(preset, **TINY, data=str(tree), outputs=str(tmp_path)))
        assert [record["kind"] for record in run.train()][-1] == "end"
        table = run.evaluation()
        rows = table[(table["embedder"] == "pixels") & (table["index"] == "merged")].set_index("domain")
        # 8 + 7 + 7 + 6 + 4 + 6 in domains that search themselves; inshop 5, met 13, gldv2 19 in an index.
        assert set(rows["n_index"]) == {8 + 7 + 7 + 5 + 6 + 13 + 19 + 6}
        # One of GLDv2's four queries has no image in the index; another shows two landmarks and looks like the first,
        # so that of its four images three are among the first four.
        expected = {**dict.fromkeys(ORDER, 100.0), "gldv2": 75.0}
        assert rows["r_at_1"].drop("mean").to_dict() == pytest.approx(expected)
        assert rows.loc["gldv2", "mmp_at_5"] == pytest.approx(100 * (3 / 4 + 1 + 1 + 0) / 4)
        assert rows.loc["mean", "r_at_1"] == pytest.approx((7 * 100 + 75) / 8)

    def test_the_train_notebook_runs_on_the_tree(self, tree: Path, tmp_path: Path) -> None:
        preset, out = tmp_path / "tiny.yaml", tmp_path / "train.ipynb"
        preset.write_text(yaml.safe_dump({"preset": "uned_in21k", **TINY}))
        options = ["-f", str(preset), "-p", "data", str(tree), "-p", "outputs", str(tmp_path / "results")]
        done = papermill(PROJECT / "notebooks" / "train.ipynb", out, *options)
        assert done.returncode == 0, done.stderr[-3000:]
        shown = outputs(out)
        assert sum(PLOTLY in data for data in shown) == 5
        assert sum(SHEET in data.get("text/html", "") for data in shown) == 1
        assert any("97 of 34 classes" in data.get("text/html", "") for data in shown)
        [table] = [data["text/html"] for data in shown if "R@1</th>" in data.get("text/html", "")]
        assert [table.find(f">{name}<") for name in ORDER] == sorted(table.find(f">{name}<") for name in ORDER)
        assert "test R@1" in text(out)


def test_the_data_notebook_shows_the_tree_beside_the_official_counts(
    tree: Path, catalog: Catalog, tmp_path: Path, warm_papermill: Callable[..., CompletedProcess]
) -> None:
    out = tmp_path / "data.ipynb"
    done = warm_papermill(PROJECT / "notebooks" / "data.ipynb", out, "-p", "data", str(tree))
    assert done.returncode == 0, done.stderr[-3000:]
    shown = outputs(out)
    [table] = [data["text/html"] for data in shown if "<th>verdict</th>" in data.get("text/html", "")]
    assert table.count("⚠ differs") == 9
    assert "<td>12 of 1,422,914</td>" in table
    assert sum(PLOTLY in data for data in shown) == 2
    assert sum(SHEET in data.get("text/html", "") for data in shown) == 3  # copies, samples, augmented ones
    assert catalog.fingerprint in text(out)


def test_the_tree_is_the_same_every_time(tree: Path, tmp_path: Path) -> None:
    again = write_uned_tree(tmp_path / "again")
    files = sorted(path.relative_to(tree) for path in tree.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((tree / path).read_bytes() == (again / path).read_bytes() for path in files)
    assert set(info_files()) == set(ORDER)
