from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnunet_cil.chain import JOINT
from nnunet_cil.evaluate import collect_scores, evaluation_file
from nnunet_cil.report import gallery, write
from nnunet_cil.report.collect import collect
from nnunet_cil.report.write import write_report
from nnunet_cil.schedule import load_schedule
from tests.report import browser
from tests.report.chain_files import open_chain, write_chain, write_predictions, write_scores, write_test_set

SECTIONS = ("summary", "numbers", "scores", "subjects", "pictures", "training", "prototypes", "made")
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The tags and texts of a page; complains about tags that are not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def rows(self, caption: str) -> list[list[str]]:
        """Text of the cells of a table's body, without the sign before a method's name."""
        body = self.html.partition(f"<caption>{caption}</caption>")[2].partition("</table>")[0].partition("<tbody>")[2]
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in body.split("</tr>") if line]
        return [[re.sub(r'<span class="mark".*?</span>|<[^>]+>', "", cell) for cell in line] for line in cells if line]

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def chain(nnunet_folders, tmp_path):
    return open_chain(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Page of a chain of four methods and two seeds that lacks nothing."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / name).mkdir()
            patch.setenv(name, str(folder / name))
        chain = open_chain(folder)
        yield write_report(chain, write_chain(chain, ("pgcd", "finetune", "replay", "joint"), seeds=(0, 1)))


def test_a_whole_report(whole):
    path = whole
    assert path.name == "report.html"
    assert path.stat().st_size < write.MAX_BYTES
    page = Page(path)
    assert tuple(section["id"] for section in page.all("section")) == SECTIONS
    assert "pgcd kept both earlier organs; it learned blob." in page.text
    assert "finetune lost both earlier organs; it learned blob." in page.text
    assert not list(path.parent.glob("*.part"))
    figures = {file.name for file in (path.parent / "figures").iterdir()}
    assert {f"{name}.png" for name in ("mean_dice", "score_matrix", "forgetting", "qualitative")} <= figures
    assert {f"{name}.png" for name in ("prototype_similarity", "prototype_drift", "loss_terms_pgcd")} <= figures
    assert {f"subjects_{score}.png" for score in ("dice", "hd95_mm", "nsd")} <= figures
    stems = [{Path(name).stem for name in figures if name.endswith(ending)} for ending in (".png", ".pdf")]
    assert stems[0] == stems[1]


def test_the_page_needs_nothing_but_itself(whole):
    page = Page(whole)
    assert page.all("script") == []
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), (tag, target)
    assert not re.search(r"https?://|@import|url\((?!data:)", page.html)
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {a["href"][1:] for a in page.all("a")} <= anchors


def test_every_image_decodes_and_is_described(whole):
    images = Page(whole).all("img")
    assert len(images) >= 10
    for image in images:
        kind, content = image["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as decoded:
            decoded.load()
            assert decoded.size == (int(image["width"]), int(image["height"]))
        assert len(image["alt"]) > 40


def test_figures_say_what_to_look_at(whole):
    page = Page(whole)
    assert len(page.all("figcaption")) == len(page.all("figure")) == len(page.all("img"))
    assert len(re.findall(r"Figure \d+\.", page.text)) == len(page.all("figure"))


def test_odd_names_are_text(nnunet_folders, tmp_path):
    odd = "<b>&\"'<script>alert(1)</script>"
    chain = open_chain(tmp_path, steps=((odd, "$x$"), ("_hidden",)))
    page = Page(write_report(chain, write_chain(chain, methods=("pgcd", "finetune"), cases=("a<i>&lt;",))))
    assert odd in page.text
    assert page.all("script") == page.all("b") == page.all("i") == []
    alts = " ".join(image["alt"] for image in page.all("img"))
    assert odd in alts
    assert "Typical subject a<i>&lt;" in alts


def test_a_method_that_keeps_scans_says_so_wherever_it_is_named(whole):
    page = Page(whole)
    told = page.text.partition("How this was made")[2].partition("Commands")[0]  # its commands are lines to type
    described = " ".join(attributes["alt"] for attributes in page.all("img"))
    for text in (re.sub(r"figures/\S+", "", told), described):
        assert text.count("replay") > 3
        assert re.findall(r"[^.]{0,40}replay(?! \(not privacy-safe\))[^.]{0,20}", text) == []


def test_missed_organs_and_the_gap_to_joint_are_told(whole):
    page = Page(whole)
    lines = {cells[0]: cells[1:] for cells in page.rows("Organs missed or invented, and joint training")}
    # three subjects, three organs and two seeds: finetune has the two old organs in none
    assert lines["finetune"][:4] == ["12", "0", "0", "18"]
    assert lines["pgcd"][:4] == ["0", "0", "0", "18"]
    assert float(lines["finetune"][4]) > 0 > float(lines["pgcd"][4])
    assert lines["joint"][4:] == ["n/a", "n/a"]


def _bold(page: Page, caption: str) -> dict[str, list[str]]:
    """Column -> methods whose number there is bold."""
    body = page.html.partition(f"<caption>{caption}</caption>")[2].partition("</table>")[0]
    header, *lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in body.split("</tr>")[:-1]]
    names = [re.sub(r"<br>.*|<[^>]+>", "", cell) for cell in header]
    methods = [re.sub(r'<span class="mark".*?</span>|<[^>]+>', "", line[0]) for line in lines]
    return {
        name: [method for method, line in zip(methods, lines, strict=True) if "<strong>" in line[c]]
        for c, name in enumerate(names)
    }


def _scored(chain, dice: dict[str, dict[int, float]]) -> list:
    """Variants of these methods and seeds, all organs of the last step with this Dice."""
    variants = [chain.variant(method, seed) for method, by_seed in dice.items() for seed in by_seed]
    for variant in variants:
        value = dice[variant.method][variant.seed]
        step = JOINT if variant.method == JOINT else 2
        write_scores(chain, variant, step, {"a": dict.fromkeys(("ball", "tube", "blob"), value)})
    return variants


LAST = "Dice of each organ after the last step"


def test_the_best_is_one_of_those_with_the_same_seeds(chain):
    dice = {"pgcd": {0: 0.7, 1: 0.6}, "pseudo": {0: 0.5, 1: 0.5}, "mib": {0: 0.9}, "plop": {0: 0.8}}
    page = Page(write_report(chain, _scored(chain, dice)))
    assert _bold(page, LAST)["all organs"] == ["pgcd"]
    assert [line[1] for line in page.rows(LAST)] == ["0 1", "0 1", "0", "0"]
    assert "Bold: best of the methods with seeds 0, 1. " in page.text


def test_the_best_in_forgetting_has_the_least(chain):
    before, after = {"ball": 0.9, "tube": 0.9}, {"pgcd": 0.6, "pseudo": 0.8, "mib": 0.7}
    write_scores(chain, chain.variant("pgcd", 0), 1, {"a": before})
    page = Page(write_report(chain, _scored(chain, {method: {0: dice} for method, dice in after.items()})))
    bold = _bold(page, "Keeping the old and learning the new")
    assert bold["forgetting"] == ["pseudo"]
    assert bold["change since learned"] == bold["all steps"] == bold["earlier organs"] == ["pseudo"]


def test_joint_is_never_the_best(chain):
    dice = {"pgcd": {0: 0.7}, "pseudo": {0: 0.5}, "joint": {0: 0.7}}
    page = Page(write_report(chain, _scored(chain, dice)))
    assert _bold(page, LAST)["all organs"] == ["pgcd"]
    assert _bold(page, "Keeping the old and learning the new")["all organs"] == ["pgcd"]


def test_nothing_is_the_best_where_no_two_methods_have_the_same_seeds(chain):
    page = Page(write_report(chain, _scored(chain, {"pgcd": {0: 0.7, 1: 0.6}, "mib": {0: 0.9, 2: 0.9}})))
    assert _bold(page, LAST)["all organs"] == []
    assert "Nothing is bold, as no two methods have the same seeds." in page.text


def test_a_method_that_has_not_come_as_far_does_not_keep_others_from_being_the_best(chain):
    variants = _scored(chain, {"pgcd": {0: 0.7}, "pseudo": {0: 0.5}})
    variants += [chain.variant(method, seed) for method in ("mib", "plop") for seed in (1, 2)]
    for seed in (1, 2):
        write_scores(chain, chain.variant("pgcd", seed), 1, {"a": {"ball": 0.9, "tube": 0.9}})
    page = Page(write_report(chain, variants))
    assert _bold(page, LAST)["all organs"] == ["pgcd"]
    assert "Bold: best of the methods that learn step by step. " in page.text


MANY_ORGANS = ("a", "b", "c", "d", "e", "f")


@pytest.mark.parametrize("organs", [MANY_ORGANS[:3], MANY_ORGANS])
def test_what_became_of_each_organ_has_the_fewer_as_columns(nnunet_folders, tmp_path, organs):
    chain = open_chain(tmp_path, [organs[:1], organs[1:]])
    variants = [chain.variant(method, 0) for method in ("pgcd", "pseudo", "mib", "plop", "lwf")]
    for variant in variants:
        write_scores(chain, variant, 2, {"case": dict.fromkeys(organs, 0.7)})
    rows = Page(write_report(chain, variants)).rows("What became of each organ")
    if len(organs) > len(variants):
        assert [line[0] for line in rows] == list(organs)
    else:
        assert [line[0] for line in rows] == [variant.method for variant in variants]
    assert rows[-1][-1] == "+ learned70.0"


def test_a_distance_to_joint_names_the_seeds_that_it_is_of(chain):
    dice = {"pgcd": {0: 0.72, 1: 0.6, 2: 0.6}, "joint": {0: 0.767}}
    page = Page(write_report(chain, _scored(chain, dice)))
    assert "64.0 mean Dice, 4.7 points below joint training (seed 0 alone)" in page.text
    assert page.rows("Organs missed or invented, and joint training")[0][5] == "+4.7 (seed 0)"


def test_what_a_step_takes_and_keeps_is_told(whole):
    rows = {cells[0]: cells[1:] for cells in Page(whole).rows("By step")}
    assert list(rows) == [
        "step 1, of all methods",
        "pgcd, step 2",
        "finetune, step 2",
        "replay (not privacy-safe), step 2",
        "joint, all organs",
    ]
    assert rows["step 1, of all methods"] == ["2 min", "2.0 GiB", "", "", "none", "none"]
    time, memory, gpu_memory, added, prototypes, scans = rows["replay (not privacy-safe), step 2"]
    assert (time, memory, gpu_memory, added, scans) == ("2 min", "2.0 GiB", "", "9", "3,072.0 KiB")
    assert 0.5 < float(prototypes.removesuffix(" KiB")) < 10
    assert rows["pgcd, step 2"] == [time, memory, gpu_memory, added, prototypes, "none"]
    assert rows["joint, all organs"][3:] == ["", "all data", "all data"]


def test_commands_train_no_more_than_there_is(chain):
    variants = [chain.variant(method, seed) for method, seed in (("pgcd", 0), ("joint", 0), ("pgcd", 1))]
    for variant in variants:
        dice = dict.fromkeys(("ball", "tube", "blob"), 0.8)
        write_scores(chain, variant, JOINT if variant.method == JOINT else 2, {"a": dice})
    commands = Page(write_report(chain, variants)).text.partition("Commands")[2]
    assert "nnunet-cil run tiny.yaml --methods pgcd joint --seeds 0" in commands
    assert "nnunet-cil run tiny.yaml --methods pgcd --seeds 1" in commands


def test_a_variant_of_another_method_is_described_by_that(chain):
    variants = {
        "mib_5": {"trainer": "nnUNetTrainerMiB", "lambda_kd": 5.0},
        "replay_20": {"trainer": "nnUNetTrainerReplay", "replay_cases": 20},
        "strong": {"lambda_pgcd": 3.0, "one_piece": True},
    }
    with chain.schedule.file.open("a") as file:
        file.write(f"variants: {json.dumps(variants)}\n")
    chain.schedule = load_schedule(chain.schedule.file)
    compared = [chain.variant(method, 0) for method in ("pgcd", *variants)]
    for variant in compared:
        write_scores(chain, variant, 2, {"a": dict.fromkeys(("ball", "tube", "blob"), 0.8)})
    text = Page(write_report(chain, compared)).text
    assert "MiB:" in text
    assert re.search(r"MiB: [^.]*, with lambda_kd 5", text)
    assert re.search(r"Not privacy-safe: [^.]*, with replay_cases 20", text)
    assert "The schedule's method, with lambda_pgcd 3.0, one_piece true" in text


def test_several_test_sets_have_a_column_each(chain):
    write_test_set(chain, ("a", "b", "c"))
    path = chain.folder / "test" / "test.json"
    test = json.loads(path.read_text(encoding="utf-8"))
    test["cases"]["c"]["set"] = 1
    path.write_text(json.dumps(test))
    values = {"a": 0.9, "b": 0.7, "c": 0.4}
    variant = chain.variant("pgcd", 0)
    write_scores(chain, variant, 2, {case: dict.fromkeys(("ball", "tube", "blob"), v) for case, v in values.items()})
    page = Page(write_report(chain, [variant]))
    assert page.rows("Mean Dice after the last step, by test set") == [["pgcd", "80.0", "40.0"]]
    assert "test set 2" in page.text
    assert "%, 1 subject, 3 organs, unknown whether trained on" in page.text


def test_nothing_private_is_told(whole):
    text = re.sub(r"base64,[^\"]*", "", whole.read_text(encoding="utf-8"))
    for private in ("secret", str(whole.parents[2]), "/home/", "/tmp/", "hostname"):
        assert private not in text
    assert "9.9.9" in text
    assert re.search(r"[0-9a-f]{64}", text)


def test_nothing_is_scored_yet(chain):
    page = Page(write_report(chain, [chain.variant("pgcd", 0)]))
    assert "Nothing is scored yet" in page.text
    assert "0 of 2 models are scored" in page.text
    assert page.all("img") == []


def test_nothing_is_prepared(chain):
    chain.content["plans_name"] = None
    assert "Nothing is scored yet" in Page(write_report(chain, [chain.variant("pgcd", 0)])).text


def test_no_test_set(chain):
    object.__setattr__(chain.schedule, "test", ())
    assert "Nothing is scored yet" in Page(write_report(chain, [chain.variant("pgcd", 0)])).text


def test_a_chain_in_the_middle_of_its_first_method(chain):
    variant = chain.variant("pgcd", 0)
    write_scores(chain, variant, 1, {"a": {"ball": 0.9, "tube": 0.4}, "b": {"ball": 0.8, "tube": None}})
    page = Page(write_report(chain, [variant, chain.variant("finetune", 0)]))
    assert "still to come" in page.text
    assert "partly learned" in page.text
    assert "after step 1 of 2" in page.text
    assert "Forgetting is not shown" in page.text
    assert "No pictures are shown" in page.text


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("prototypes", "No prototypes of pgcd are stored."),
        ("logs", "No loss terms of pgcd"),
        ("predictions", "No pictures are shown: there are no predictions of the last step."),
        ("images", "is not shown: its image or masks cannot be read or drawn."),
        ("one prediction", "no prediction of the typical subject"),
    ],
)
def test_what_is_missing_is_said(chain, what, sentence):
    variants = write_chain(chain, methods=("pgcd",))
    fold = chain.model_folder(variants[0], 2) / "fold_all"
    predictions = next(evaluation_file(chain, variants[0], 2, "all").parent.glob("*_*"))
    if what == "prototypes":
        for step in (1, 2):
            (chain.model_folder(variants[0], step) / "fold_all" / "prototypes.npz").unlink()
    elif what == "logs":
        next(fold.glob("training_log_*.txt")).unlink()
    elif what == "predictions":
        shutil.rmtree(predictions)
    elif what == "images":
        shutil.rmtree(chain.folder / "test" / "images")
    else:
        for case in ("case_1", "case_2", "case_3"):
            (predictions / f"{case}.nii.gz").unlink()
    assert sentence in Page(write_report(chain, variants)).text


def test_figures_of_single_models_show_one_seed_where_all_have_it(chain, monkeypatch):
    for name in [name for name in vars(gallery) if name.startswith("plot_")]:
        monkeypatch.setattr(gallery, name, lambda *_, **__: None)
    variants = write_chain(chain, methods=("pgcd", "mib"), seeds=(0, 1))
    # as after `gather`: scores of a training that is elsewhere
    shutil.rmtree(next(evaluation_file(chain, variants[0], 2, "all").parent.glob("*_*")))
    (chain.model_folder(variants[0], 2) / "fold_all" / "prototypes.npz").unlink()
    next((chain.model_folder(variants[0], 2) / "fold_all").glob("training_log_*.txt")).unlink()
    shelves = gallery.draw_all(collect(chain, variants), chain.folder)
    for kind in ("pictures", "prototypes"):
        assert all(figure.caption.endswith(" Models of seed 1.") for figure in shelves[kind].figures)
    assert len(shelves["training"].figures) == 2
    assert all("seed 1." in figure.alt for figure in shelves["training"].figures)
    shutil.rmtree(next(evaluation_file(chain, variants[-1], 2, "all").parent.glob("*_*")))
    (panel,) = gallery.draw_all(collect(chain, variants), chain.folder)["pictures"].figures
    assert panel.caption.endswith(" Seeds of the models: pgcd 1, mib 0.")


def test_an_organ_that_no_subject_has(chain):
    variant = chain.variant("pgcd", 0)
    write_scores(chain, variant, 1, {"a": {"ball": 0.9, "tube": None}})
    write_scores(chain, variant, 2, {"a": {"ball": 0.9, "tube": None, "blob": 0.8}})
    page = Page(write_report(chain, [variant]))
    assert "not scored" in page.text
    assert "nan" not in page.text


@pytest.mark.parametrize("methods", [("pgcd", "mib"), ("pgcd", "finetune", "joint")])
def test_subjects_of_the_pictures_are_chosen_by_the_method_that_the_table_compares_with(
    nnunet_folders, tmp_path, methods
):
    chain = open_chain(tmp_path, trainer="nnUNetTrainerMiB")
    page = Page(write_report(chain, write_chain(chain, methods)))
    (chosen,) = set(re.findall(r"Chosen by the scores of (\w+):", page.text))
    (compared,) = set(re.findall(r"Is the difference to (\w+) more than chance", page.text))
    assert chosen == compared == ("mib" if "mib" in methods else "pgcd")


def test_pictures_have_each_subjects_own_dice(chain, monkeypatch):
    seen = {}
    plot_panel = gallery.plot_panel

    def seeing(slices, scores, *args):
        seen.update(scores)
        plot_panel(slices, scores, *args)

    monkeypatch.setattr(gallery, "plot_panel", seeing)
    variants = write_chain(chain, ("pgcd", "joint"), cases=("a", "b", "c"))
    for variant, rank in zip(variants, (0.0, 0.1), strict=True):
        dice = {
            case: {"ball": value - rank, "tube": 0.7, "blob": None}
            for case, value in zip("abc", (0.9, 0.3, 0.5), strict=True)
        }
        write_predictions(chain, write_scores(chain, variant, JOINT if rank else 2, dice), dice)
    page = Page(write_report(chain, variants))
    by_kind = {title.split()[0]: scores for title, scores in seen.items()}
    assert by_kind["Typical"] == pytest.approx({"pgcd": 0.6, "joint": 0.55})
    assert by_kind["Worst"] == pytest.approx({"pgcd": 0.5, "joint": 0.45})
    (alt,) = [image["alt"] for image in page.all("img") if "Worst subject" in image["alt"]]
    assert "Typical subject c, mean Dice over its organs: pgcd 60.0, joint 55.0." in alt


def test_distances_are_those_of_the_table(chain):
    """A seed is the mean over the subjects that have a distance, however many these are."""
    variants = [chain.variant("pgcd", seed) for seed in (0, 1)]
    for variant, dice in zip(variants, ((0.9, 0.1), (0.9, 0.0)), strict=True):  # 3 and 11 mm, 3 mm and missed
        scores = {case: {"ball": value, "tube": 0.7, "blob": 0.7} for case, value in zip("ab", dice, strict=True)}
        write_scores(chain, variant, 2, scores)
    page = Page(write_report(chain, variants))
    found = collect_scores(chain, variants)[0]["runs"]
    means = [np.mean([run["hd95_mm"][-1][c] for run in found]) for c in range(3)]
    cells = page.rows("HD95 after the last step, mm: lower is better")[0]
    assert cells == ["pgcd", "5.0 (3 of 4)", "5.0", "5.0"]
    np.testing.assert_allclose(means, [5, 5, 5])


def test_joint_alone(chain):
    variant = chain.variant("joint", 0)
    write_scores(chain, variant, JOINT, {"a": {"ball": 0.9, "tube": 0.8, "blob": 0.7}})
    page = Page(write_report(chain, [variant]))
    assert "80.0" in page.text
    assert "nan" not in page.text


def test_a_page_that_would_be_too_large_takes_smaller_figures(chain, monkeypatch):
    variants = write_chain(chain, methods=("pgcd",))
    full = write_report(chain, variants).stat().st_size
    monkeypatch.setattr(write, "MAX_BYTES", round(0.7 * full))
    path = write_report(chain, variants)
    assert path.stat().st_size < 0.7 * full
    assert len(Page(path).all("img")) > 5


def test_a_failed_write_keeps_the_old_page(chain, monkeypatch):
    path = chain.folder / "report.html"
    path.write_text("old")
    monkeypatch.setattr(write.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(chain, [chain.variant("pgcd", 0)])
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.skipif(browser.chromium() is None, reason="no Chromium on this machine")
def test_in_a_browser(whole):
    with browser.browsing() as page:
        for width, dark in ((1280, False), (1280, True), (390, False)):
            page.open(whole, width=width, dark=dark)
            page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert page.value("document.images.length") >= 10
            assert page.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert page.value("document.documentElement.scrollWidth") == width
            ground = page.value("getComputedStyle(document.body).backgroundColor")
            light = sum(map(int, re.findall(r"\d+", ground))) > 382
            assert light is not dark
        stays = "[...document.querySelectorAll('tbody th')].filter(e => getComputedStyle(e).position == 'sticky')"
        assert page.value(f"{stays}.every(e => e.offsetWidth < e.closest('.scroll').clientWidth / 2)")
        page.value("document.querySelector('.order .name').append('_with_a_long_name'.repeat(5))")
        assert page.value("document.documentElement.scrollWidth") == 390
        assert page.messages == []

        page.press("Tab")
        assert page.value("document.activeElement.className") == "skip"
        page.press("Enter")
        assert page.value("document.activeElement.id") == "main"
        wide = "[...document.querySelectorAll('div, pre')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        assert page.value(f"{wide}.length") > 0
        assert page.value(f"{wide}.every(e => e.tabIndex === 0)")
