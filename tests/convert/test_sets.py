"""Each public set: what is found in its layout, where voxels end up in the world, and layouts that are wrong."""

import json
import pickle
import shutil
from importlib import import_module
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK
from nnunetv2.experiment_planning import verify_dataset_integrity
from PIL import Image

from nnunet_cil.cli.convert import MODALITIES, SETS
from nnunet_cil.convert import amos, btcv, chaos, msd, totalsegmentator, word
from nnunet_cil.convert.source import seeded_test
from nnunet_cil.convert.write import write_dataset
from tests.convert.made_up import (
    BRIGHT,
    DICOM_SPACING_MM,
    MAKERS,
    TOTAL_ORGANS,
    dicom_axes,
    make_amos,
    make_btcv,
    make_chaos,
    make_msd,
    make_totalsegmentator,
    make_word,
    marks,
    oblique,
    to_grey,
    volumes,
    write_nifti,
    write_png,
    write_series,
)

CHOICES = [
    ("btcv", {}),
    ("word", {}),
    ("amos", {"modality": "ct"}),
    ("amos", {"modality": "mr"}),
    ("totalsegmentator", {"organs": TOTAL_ORGANS}),
    ("msd", {}),
    ("chaos", {"modality": "ct"}),
    ("chaos", {"modality": "t2spir"}),
    ("chaos", {"modality": "t1dual"}),
]
IDS = ["-".join([name, *map(str, options.values())]) if name in MODALITIES else name for name, options in CHOICES]


def find(name, source, options):
    return import_module(f"nnunet_cil.convert.{name}").find(source, **options)


def place(name, at):
    """Where a voxel of the source lies, in LPS mm."""
    if name != "chaos":
        return np.diag([-1, -1, 1]) @ (oblique() @ [*at, 1])[:3]
    z, y, x = at
    row, column, normal = dicom_axes()
    sx, sy, sz = DICOM_SPACING_MM
    return np.array((10, -20, 30)) + x * sx * row + y * sy * column + z * sz * normal


def labelled_points(path):
    """Physical point of the one voxel of each label, read by ITK."""
    image = SimpleITK.ReadImage(str(path))
    voxels = SimpleITK.GetArrayFromImage(image)
    at = {int(v): np.argwhere(voxels == v) for v in np.unique(voxels) if v}
    assert all(len(found) == 1 for found in at.values())
    return {v: np.array(image.TransformIndexToPhysicalPoint(found[0][::-1].tolist())) for v, found in at.items()}


def as_bright(path, point):
    image = SimpleITK.ReadImage(str(path))
    return image[image.TransformPhysicalPointToIndex(point.tolist())]


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=IDS)
def test_voxels_keep_their_place_in_the_world_and_their_label(tmp_path, nnunet_folders, name, options):
    found = find(name, MAKERS[name](tmp_path), options)
    folder = write_dataset(found, 300).folder
    shape = (5, 4, 6) if name == "chaos" else (4, 5, 6)
    expected = {value: place(name, at) for value, at in marks(len(found.labels) - 1, shape).items()}
    for case in found.cases:
        points = labelled_points(folder / "labelsTr" / f"{case.name}.nii.gz")
        assert set(points) == set(expected)
        for value, point in points.items():
            np.testing.assert_allclose(point, expected[value], atol=2e-4)
            for channel in range(len(found.channels)):
                path = folder / "imagesTr" / f"{case.name}_{channel:04d}.nii.gz"
                assert as_bright(path, point) == BRIGHT + value + 10 * channel


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=IDS)
def test_dataset_is_described(tmp_path, nnunet_folders, name, options):
    found = find(name, MAKERS[name](tmp_path), options)
    converted = write_dataset(found, 300)
    content = json.loads((converted.folder / "dataset.json").read_text(encoding="utf-8"))
    assert content["labels"]["background"] == 0
    assert sorted(content["labels"].values()) == list(range(len(content["labels"])))
    assert content["numTraining"] == len(list((converted.folder / "labelsTr").iterdir())) == len(found.cases)
    assert content["file_ending"] == ".nii.gz"
    assert (content["channel_names"]["0"] == "CT") == (
        options.get("modality", name) not in ("mr", "t2spir", "t1dual", "msd")
    )
    assert content["licence"]
    assert content["reference"]
    split = json.loads((converted.folder / "split.json").read_text(encoding="utf-8"))
    assert sorted(split["train"] + split["test"]) == sorted(case.name for case in found.cases)
    assert split["train"]
    assert split["test"]
    assert not set(split["train"]) & set(split["test"])
    assert split["origin"]


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=IDS)
def test_nnunet_finds_the_dataset_whole(tmp_path, nnunet_folders, monkeypatch, capsys, name, options):
    """What ``nnUNetv2_plan_and_preprocess --verify_dataset_integrity`` calls, with threads for its processes."""
    monkeypatch.setattr(
        verify_dataset_integrity,
        "multiprocessing",
        SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool)),
    )
    folder = write_dataset(find(name, MAKERS[name](tmp_path), options), 300).folder
    verify_dataset_integrity.verify_dataset_integrity(str(folder), 1)
    shown = capsys.readouterr().out
    assert "verify_dataset_integrity Done" in shown
    assert "error" not in shown.lower().replace("if you didn't see any error messages", "")
    assert "warning" not in shown.lower()


@pytest.mark.parametrize(("name", "options"), CHOICES, ids=IDS)
def test_cases_go_to_worker_processes(tmp_path, name, options):
    found = find(name, MAKERS[name](tmp_path), options)
    assert pickle.loads(pickle.dumps((found.write, found.cases))) == (found.write, found.cases)


def test_the_command_line_knows_all_sets_and_modalities():
    assert set(SETS) == set(MAKERS)
    assert {"amos": amos.MODALITIES, "chaos": tuple(chaos.CHANNELS)} == MODALITIES


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_above_is_refused_with_the_right_one(tmp_path, name):
    source = MAKERS[name](tmp_path / "download")
    options = dict(CHOICES)[name]
    with pytest.raises(ValueError, match="expected ") as error:
        find(name, tmp_path / "download", options)
    assert f"Give {source}/ instead." in str(error.value)
    with pytest.raises(FileNotFoundError, match="got no folder"):
        find(name, tmp_path / "none", options)


@pytest.mark.parametrize(("name", "inside"), [("btcv", "Training/img"), ("totalsegmentator", "s0000"), ("chaos", "CT")])
def test_a_folder_inside_is_refused_with_the_right_one(tmp_path, name, inside):
    source = MAKERS[name](tmp_path)
    with pytest.raises(ValueError, match="expected ") as error:
        find(name, source / inside, {**dict(CHOICES)[name], **({"modality": "t2spir"} if name == "chaos" else {})})
    assert f"Give {source}/ instead." in str(error.value)


def test_what_macos_leaves_in_archives_is_not_seen(tmp_path):
    source = make_totalsegmentator(tmp_path / "download" / "a")
    shutil.copytree(source, tmp_path / "download" / "__MACOSX" / source.name)
    with pytest.raises(ValueError, match="expected ") as error:
        totalsegmentator.find(tmp_path / "download", TOTAL_ORGANS)
    assert f"Give {source}/ instead." in str(error.value)
    (source / "__MACOSX").mkdir()
    assert len(totalsegmentator.find(source, TOTAL_ORGANS).cases) == 4


@pytest.mark.parametrize("module", [amos, chaos])
def test_unknown_modality(tmp_path, module):
    with pytest.raises(ValueError, match="--modality: got 'pet', expected one of"):
        module.find(tmp_path, modality="pet")


# BTCV


def test_btcv_split_is_transunets(tmp_path):
    found = btcv.find(make_btcv(tmp_path))
    assert len(found.cases) == 30
    assert found.test == {f"img{n:04d}" for n in (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)}
    assert found.labels["liver"] == 6
    assert found.labels["left_adrenal_gland"] == 13


def test_btcv_problems_come_all_at_once(tmp_path):
    root = make_btcv(tmp_path)
    (root / "Training" / "img" / "img0003.nii.gz").unlink()
    (root / "Training" / "label" / "label0007.nii.gz").unlink()
    write_nifti(root / "Training" / "img" / "img0061.nii.gz", volumes(1)[0])
    write_nifti(root / "Training" / "img" / "scan.nii.gz", volumes(1)[0])
    (root / "Training" / "label" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="layout than that of BTCV; nothing was written") as error:
        btcv.find(root)
    for part in (
        "no ['img0003.nii.gz']",
        "no ['label0007.nii.gz']",
        "['img0061.nii.gz']",
        "['scan.nii.gz']",
        "notes.txt",
    ):
        assert part in str(error.value)


# WORD


def test_word_holds_out_its_own_parts(tmp_path, nnunet_folders):
    found = word.find(make_word(tmp_path))
    folder = write_dataset(found, 310).folder
    split = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    assert split["train"] == ["word_0002", "word_0003", "word_0005"]
    assert split["test"] == ["word_0001", "word_0009", "word_0014"]
    assert split["parts"]["imagesVal"] == ["word_0001", "word_0009"]
    assert split["parts"]["imagesTs"] == ["word_0014"]


def test_word_without_test_labels_says_where_they_are(tmp_path):
    root = make_word(tmp_path)
    shutil.rmtree(root / "labelsTs")
    with pytest.raises(ValueError, match=r"WORD_V0\.1\.0_labelsTs\.zip"):
        word.find(root)


def test_word_problems_come_all_at_once(tmp_path):
    root = make_word(tmp_path)
    (root / "labelsTr" / "word_0003.nii.gz").unlink()
    (root / "imagesVal" / "word_0009.nii.gz").unlink()
    shutil.copy(root / "imagesTr" / "word_0002.nii.gz", root / "imagesTs" / "word_0002.nii.gz")
    shutil.copy(root / "labelsTr" / "word_0002.nii.gz", root / "labelsTs" / "word_0002.nii.gz")
    with pytest.raises(ValueError, match="nothing was written") as error:
        word.find(root)
    assert "labelsTr: got no ['word_0003.nii.gz'], expected the label of an image" in str(error.value)
    assert "imagesVal: got no ['word_0009.nii.gz'], expected the image of a label" in str(error.value)
    assert "['word_0002'] in more than one part" in str(error.value)


# AMOS


@pytest.mark.parametrize(("modality", "train", "test"), [("ct", (1, 4, 410), (8, 13)), ("mr", (507, 518), (530,))])
def test_amos_modality_follows_from_the_number(tmp_path, modality, train, test):
    found = amos.find(make_amos(tmp_path), modality)
    assert {case.name for case in found.cases} - found.test == {f"amos_{n:04d}" for n in train}
    assert found.test == {f"amos_{n:04d}" for n in test}
    assert found.channels == (modality.upper(),)
    assert found.name == f"AMOS_{modality.upper()}"


def test_amos_without_labels_or_with_other_names(tmp_path):
    root = make_amos(tmp_path)
    shutil.rmtree(root / "labelsVa")
    write_nifti(root / "imagesTr" / "case7.nii.gz", volumes(1)[0])
    with pytest.raises(ValueError, match="nothing was written") as error:
        amos.find(root, "ct")
    assert f"{root / 'labelsVa'}: got no folder" in str(error.value)
    assert "['case7.nii.gz']" in str(error.value)


# TotalSegmentator


def test_totalsegmentator_follows_meta_csv(tmp_path, nnunet_folders):
    found = totalsegmentator.find(make_totalsegmentator(tmp_path), ["spleen", "liver"])
    assert found.labels == {"background": 0, "spleen": 1, "liver": 2}
    assert found.test == {"s0010"}
    assert {case.name: case.part for case in found.cases} == {
        "s0000": "train",
        "s0001": "val",
        "s0010": "test",
        "s0011": "train",
    }


def test_totalsegmentator_later_organ_wins_and_overlap_is_told(tmp_path, nnunet_folders, caplog):
    root = make_totalsegmentator(tmp_path)
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[marks(4)[1]] = mask[0, 0, 0] = 1
    write_nifti(root / "s0001" / "segmentations" / "spleen.nii.gz", mask)
    with caplog.at_level("INFO", "nnunet_cil"):
        folder = write_dataset(totalsegmentator.find(root, ["liver", "spleen"]), 400).folder
    assert np.asanyarray(nibabel.load(folder / "labelsTr" / "s0001.nii.gz").dataobj)[marks(4)[1]] == 2
    assert "1 voxels of 1 cases are in more than one mask" in caplog.text


def test_totalsegmentator_missing_masks_and_unknown_organs_are_named(tmp_path):
    root = make_totalsegmentator(tmp_path)
    (root / "s0011" / "segmentations" / "spleen.nii.gz").unlink()
    (root / "s0000" / "ct.nii.gz").unlink()
    with pytest.raises(ValueError, match="nothing was written") as error:
        totalsegmentator.find(root, ["spleen", "right_kidney", "liver", "liver"])
    for part in (
        "got no segmentations/spleen.nii.gz of ['s0011']",
        "--organs: got 'right_kidney', expected a mask such as",
        "kidney_right",
        "s0000: got no ct.nii.gz",
        "['liver'] twice",
    ):
        assert part in str(error.value)


def test_totalsegmentator_folders_are_those_of_meta_csv(tmp_path):
    root = make_totalsegmentator(tmp_path)
    shutil.move(root / "s0001", root / "s0099")
    with pytest.raises(ValueError, match="nothing was written") as error:
        totalsegmentator.find(root, ["liver"])
    assert "got no folder ['s0001']" in str(error.value)
    assert "got folders ['s0099']" in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("image_id,split\ns0000,train\n", "got columns ['image_id,split']"),
        ("", "got columns []"),
        ("image_id;split\ns0000;train\ns0001;dev\ns0010;test\ns0011;train\n", "got ['dev'] in column split"),
        ("image_id;split\ns0000;train\ns0001;train\ns0010;val\ns0011;train\n", "expected subjects of train and test"),
    ],
)
def test_totalsegmentator_odd_meta_csv(tmp_path, text, named):
    root = make_totalsegmentator(tmp_path)
    (root / "meta.csv").write_text(text)
    with pytest.raises(ValueError, match="nothing was written") as error:
        totalsegmentator.find(root, ["liver"])
    assert named in str(error.value)


def test_totalsegmentator_says_of_another_meta_csv_nothing_else(tmp_path):
    root = make_totalsegmentator(tmp_path)
    (root / "meta.csv").write_text((root / "meta.csv").read_text(encoding="utf-8-sig").replace(";", ","))
    with pytest.raises(ValueError, match="got columns") as error:
        totalsegmentator.find(root, ["liver"])
    assert len(str(error.value).splitlines()) == 2


# Medical Segmentation Decathlon


def test_msd_takes_names_from_the_task(tmp_path):
    found = msd.find(make_msd(tmp_path))
    assert found.name == "Hippocampus"
    assert found.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert found.channels == ("MRI",)
    assert found.terms == "CC-BY-SA 4.0"
    assert len(found.cases) == 5
    assert len(found.test) == 1


def test_msd_channels_of_one_file_are_taken_apart(tmp_path, nnunet_folders):
    modality = {"0": "T2", "1": "ADC"}
    source = make_msd(tmp_path, "Task05_Prostate", {"0": "background", "1": "PZ", "2": "TZ"}, modality)
    folder = write_dataset(msd.find(source), 5).folder
    for channel in (0, 1):
        point = labelled_points(folder / "labelsTr" / "prostate_001.nii.gz")[2]
        np.testing.assert_allclose(point, place("msd", marks(2)[2]), atol=2e-4)
        path = folder / "imagesTr" / f"prostate_001_{channel:04d}.nii.gz"
        assert as_bright(path, point) == BRIGHT + 2 + 10 * channel
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["channel_names"] == modality


def test_msd_with_another_number_of_channels(tmp_path, nnunet_folders):
    source = make_msd(tmp_path, "Task05_Prostate", modality={"0": "T2", "1": "ADC"})
    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    content["modality"] = {"0": "T2", "1": "ADC", "2": "DWI"}
    (source / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"prostate_001: got 2 channels .*expected 3"):
        write_dataset(msd.find(source), 5)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"modality": {"0": "CT"}, "labels": {"background": 0}, "training": [{}]}']
)
def test_msd_with_another_dataset_json(tmp_path, text):
    source = make_msd(tmp_path)
    (source / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected the dataset\.json of a Decathlon task"):
        msd.find(source)


@pytest.mark.parametrize(
    ("text", "got"),
    [('{"modality": ', "got no JSON that can be read ("), ('{"channel_names": {"0": "CT"}}', "got no 'modality', ")],
)
def test_msd_says_once_what_is_wrong_with_dataset_json(tmp_path, text, got):
    path = make_msd(tmp_path) / "dataset.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="Decathlon") as error:
        msd.find(path.parent)
    assert str(error.value).startswith(f"{path}: {got}")
    assert str(error.value).count("Decathlon") == 1


def test_msd_with_missing_files(tmp_path):
    source = make_msd(tmp_path)
    (source / "imagesTr" / "hippocampus_002.nii.gz").unlink()
    (source / "labelsTr" / "hippocampus_003.nii.gz").unlink()
    with pytest.raises(ValueError, match="nothing was written") as error:
        msd.find(source)
    assert "no image ['hippocampus_002.nii.gz']" in str(error.value)
    assert "no label ['hippocampus_003.nii.gz']" in str(error.value)


def test_seeded_split_is_reproducible_and_needs_two():
    names = [f"a_{n}" for n in range(20)]
    assert seeded_test(names) == seeded_test(names[::-1])
    assert len(seeded_test(names)) == 5
    assert len(seeded_test(names[:2])) == 1
    with pytest.raises(ValueError, match="got 1 labelled subjects, expected at least 2"):
        seeded_test(names[:1])


# CHAOS


def test_chaos_sequences_share_their_split(tmp_path):
    root = make_chaos(tmp_path)
    first, second = (chaos.find(root, modality) for modality in ("t2spir", "t1dual"))
    assert first.test == second.test
    assert [case.name for case in first.cases] == ["chaos_mr_01", "chaos_mr_02", "chaos_mr_05", "chaos_mr_13"]
    assert first.labels == {"background": 0, "liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
    assert chaos.find(root, "ct").labels == {"background": 0, "liver": 1}


def test_chaos_mr_greys_may_lie_in_their_ranges_and_no_other(tmp_path, nnunet_folders):
    root = make_chaos(tmp_path, 2)
    path = root / "MR" / "1" / "T2SPIR" / "Ground" / "IMG-0004-00003.png"
    grey = np.zeros((4, 6), np.uint8)
    grey[1, 2], grey[3, 4] = 55, 255
    write_png(path, grey)
    folder = write_dataset(chaos.find(root, "t2spir"), 300).folder
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "labelsTr" / "chaos_mr_01.nii.gz")))
    assert (labels[2, 1, 2], labels[2, 3, 4]) == (1, 4)
    grey[0, 0] = 100
    write_png(path, grey)
    with pytest.raises(ValueError, match=r"chaos_mr_01: .*IMG-0004-00003\.png: got grey values \[100\]"):
        write_dataset(chaos.find(root, "t2spir"), 301)


@pytest.mark.parametrize("grey", [1, 255])
def test_chaos_ct_masks_are_binary(tmp_path, nnunet_folders, grey):
    root = make_chaos(tmp_path, 2)
    path = root / "CT" / "2" / "Ground" / "liver_GT_001.png"
    mask = np.zeros((4, 6), np.uint8)
    mask[2, 5] = grey
    write_png(path, mask)
    folder = write_dataset(chaos.find(root, "ct"), 300).folder
    labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "labelsTr" / "chaos_ct_02.nii.gz")))
    assert np.argwhere(labels[3]).tolist() == [[2, 5]]  # the second name from the top, of five slices
    mask[0, 0] = 63
    write_png(path, mask)
    with pytest.raises(ValueError, match=r"liver_GT_001\.png: got grey values \[63\], expected 0 and one of 1 and 255"):
        write_dataset(chaos.find(root, "ct"), 301)


def test_chaos_mask_of_another_size(tmp_path, nnunet_folders):
    root = make_chaos(tmp_path, 2)
    write_png(root / "MR" / "2" / "T2SPIR" / "Ground" / "IMG-0004-00001.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match=r"got \(5, 4\) pixels, expected \(6, 4\)"):
        write_dataset(chaos.find(root, "t2spir"), 300)


@pytest.mark.parametrize("file", ["DICOM_anon/IMG-0004-00002.dcm", "Ground/IMG-0004-00002.png"])
@pytest.mark.parametrize("share", [0, 0.7])
def test_chaos_damaged_files_are_named(tmp_path, nnunet_folders, file, share):
    path = make_chaos(tmp_path, 2) / "MR" / "2" / "T2SPIR" / file
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="1 of 2 cases cannot be converted") as error:
        write_dataset(chaos.find(tmp_path / "Train_Sets", "t2spir"), 300)
    assert str(error.value).splitlines()[1].startswith(f"  chaos_mr_02: {path}: got a damaged file (")
    assert len(str(error.value).splitlines()) == 2


def test_chaos_mask_with_a_changed_byte(tmp_path, nnunet_folders):
    """Pillow raises a SyntaxError where no chunk begins after the one before."""
    path = make_chaos(tmp_path, 2) / "MR" / "2" / "T2SPIR" / "Ground" / "IMG-0004-00002.png"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") - 1] = 3  # its length
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"IMG-0004-00002\.png: got a damaged file \("):
        write_dataset(chaos.find(tmp_path / "Train_Sets", "t2spir"), 300)


def test_chaos_ct_names_that_do_not_follow_position(tmp_path, nnunet_folders):
    root = make_chaos(tmp_path, 2)
    slices = root / "CT" / "1" / "DICOM_anon"
    (slices / "i0000,0000b.dcm").rename(slices / "i0009,0000b.dcm")
    with pytest.raises(ValueError, match=r"chaos_ct_01: .*names do not run along the body"):
        write_dataset(chaos.find(root, "ct"), 300)


def test_chaos_phases_on_other_grids(tmp_path, nnunet_folders):
    root = make_chaos(tmp_path, 2)
    out = root / "MR" / "1" / "T1DUAL" / "DICOM_anon" / "OutPhase"
    shutil.rmtree(out)
    names = [f"IMG-0004-{n:05d}" for n in range(1, 10, 2)]
    write_series(out, volumes(4, (5, 4, 6))[0].astype(np.uint16), names, "MR", origin=(10, -20, 35))
    with pytest.raises(ValueError, match=r"OutPhase: got size .*expected the grid of .*InPhase, size"):
        write_dataset(chaos.find(root, "t1dual"), 300)


def test_chaos_problems_come_all_at_once(tmp_path):
    root = make_chaos(tmp_path)
    mr = root / "MR"
    shutil.rmtree(mr / "1" / "T2SPIR" / "Ground")
    shutil.rmtree(mr / "2" / "T2SPIR" / "DICOM_anon")
    (mr / "5" / "T2SPIR" / "Ground" / "IMG-0004-00002.png").unlink()
    write_png(mr / "5" / "T2SPIR" / "Ground" / "IMG-0004-00099.png", to_grey(np.zeros((4, 6), np.uint8)))
    (mr / "notes").mkdir()
    with pytest.raises(ValueError, match="nothing was written") as error:
        chaos.find(root, "t2spir")
    for part in (
        "give Train_Sets",
        "expected DICOM slices",
        "got no masks ['IMG-0004-00002']",
        "got masks ['IMG-0004-00099']",
        "got 'notes'",
    ):
        assert part in str(error.value)
    (root / "CT" / "1" / "Ground" / "liver_GT_000.png").unlink()
    with pytest.raises(ValueError, match="got 4 masks, expected 5"):
        chaos.find(root, "ct")


def test_pillow_reads_the_masks_of_one_bit_that_the_ct_part_has(tmp_path):
    path = tmp_path / "mask.png"
    write_png(path, np.eye(4, dtype=bool))
    with Image.open(path) as image:
        assert image.mode == "1"
        assert np.unique(np.array(image.convert("L"))).tolist() == [0, 255]
