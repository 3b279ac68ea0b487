import re
import shutil

import simple_autoencoder as simple
import stack_autoencoder as stack
import util
from benchmark_common import multiply_accumulates

import h5py
import imageio.v3 as iio
import numpy as np
import pytest
from conftest import (
    NAME,
    TINY,
    assert_same_weights,
    curves_of,
    files_of,
    fixed_draws,
    labels_of,
    legend_of,
    printed_by,
    random_images,
    rows_of,
    run,
    run_of,
    save_run,
    shaken,
    small_detail_models,
    small_models,
    stop_at,
    table_rows,
    told_line,
    usage_error,
)

STACKED = "stacked_photos"
TRAIN = [*TINY, "--epochs=2", "--greedy-epochs=1"]
IMAGES = np.random.default_rng(0).random((2, 8, 12, 3)).astype(np.float32)


def level_one():
    """Encoder and decoder of z, then those of the detail code, of a shaken small simple model."""
    return [shaken(model) for models in (small_models, small_detail_models) for model in models()]


def stacked_models(change=shaken):
    """Autoencoder, encoder and decoder of a stack on a shaken level one; by default itself shaken."""
    encoder, decoder, *detail = level_one()
    z = change(stack.stack_encoder(encoder, 20, 1, 18)), change(stack.stack_decoder(decoder, 20, 1, 18))
    d = change(stack.stack_detail_encoder(detail[0], 18, 12, 1)), stack.stack_detail_decoder(detail[1], 12, 1)
    joined = simple.join_encoders(z[0], d[0]), simple.join_decoders(z[1], change(d[1]))
    return simple.build_autoencoder(*z), *joined


def test_stack_starts_as_level_one():
    autoencoder, encoder, _ = stacked_models(change=lambda model: model)
    z_encoder, z_decoder, detail_encoder, _ = level_one()
    np.testing.assert_array_equal(autoencoder(IMAGES), simple.build_autoencoder(z_encoder, z_decoder)(IMAGES))
    outputs = simple.join_encoders(z_encoder, detail_encoder)(IMAGES)
    np.testing.assert_array_equal(encoder(IMAGES)[5], outputs[3])


def test_variance_of_both_detail_codes_depends_on_wide_surroundings():
    _, *posterior = stacked_models()
    noisy = np.repeat(np.random.default_rng(0).random((1, 16, 256, 3), np.float32), 2, axis=0)
    noisy[1, 8, 128] += 1
    averaged = 4 * (stack.SURROUNDINGS // 2)
    for log_var in posterior[0].predict(noisy, verbose=0)[5::2]:
        columns = np.flatnonzero(np.abs(log_var[1] - log_var[0]).max(axis=(0, 2)) > 1e-7)
        cell = noisy.shape[2] // log_var.shape[2]
        assert averaged < 128 - cell * columns.min() <= util.DRAWS_REACH


def test_codes_of_both_levels_reach_the_decoder_in_their_order():
    autoencoder, encoder, decoder = stacked_models()
    codes = encoder.predict(IMAGES, verbose=0)
    sizes = [(2, 4, 6, 14), (2, 2, 3, 18), (2, 4, 6, 14), (2, 2, 3, 12)]
    assert [code.shape for code in codes] == [size for size in sizes for _ in ("mean", "log-variance")]
    means = [mean for mean, _ in util.code_pairs(codes)]
    assert [bool(mean.any()) for mean in means] == [True, True, False, False]
    whole = autoencoder.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(decoder.predict(means, verbose=0), whole, atol=1e-5)
    for index in range(4):
        changed = [mean + (place == index) for place, mean in enumerate(means)]
        assert np.abs(decoder.predict(changed, verbose=0) - whole).max() > 1e-3


def of_full_size():
    """Autoencoder, encoder and decoder of a stack as the scripts build it."""
    z = stack.stack_encoder(simple.build_encoder()), stack.stack_decoder(simple.build_decoder())
    detail_encoder = stack.stack_detail_encoder(simple.build_detail_encoder(), stack.LATENT_DIM)
    detail_decoder = stack.stack_detail_decoder(simple.build_detail_decoder())
    joined = simple.join_encoders(z[0], detail_encoder), simple.join_decoders(z[1], detail_decoder)
    return simple.build_autoencoder(*z), *joined


@pytest.mark.parametrize("run", [None, "stacked_photographs"])
def test_stride_and_reach_are_those_of_the_models(run):
    models = util.load_run(util.HERE, run) if run else of_full_size()
    with pytest.raises(ValueError, match="shape"):
        models[0].compute_output_shape((1, 3 * util.STRIDE // 2, 3 * util.STRIDE // 2, 3))
    pixels = np.zeros((util.STRIDE, util.STRIDE, 400, 3), np.float32)
    for index, image in enumerate(pixels):
        image[0, 200 + index] = 1
    for model in models:  # without biases and with positive kernels, what a pixel reaches is not zero
        shapes = [weight.shape for weight in model.weights]
        scales = [1 / (shape[0] * shape[2]) if len(shape) == 4 else 0 for shape in shapes]
        model.set_weights([np.full(*pair) for pair in zip(shapes, scales, strict=True)])
    autoencoder, encoder, decoder = models
    outputs = autoencoder.predict(pixels, verbose=0)
    assert outputs.shape == pixels.shape
    z = [mean + log_var for mean, log_var in util.code_pairs(encoder.predict(pixels, verbose=0))]
    for images, reach in ((outputs, util.REACH), (decoder.predict(z, verbose=0), util.DRAWS_REACH)):
        reached = np.flatnonzero(images.any(axis=(0, 1, 3)))
        assert (reached.min(), reached.max()) == (200 - reach, 199 + util.STRIDE + reach)


def test_picture_is_sampled_alike_however_it_is_cut(monkeypatch):
    monkeypatch.setattr(util, "draws", fixed_draws)
    autoencoder, *posterior = stacked_models()
    picture, results = random_images(9, 300, 3), []
    for tile in (16, 512):
        monkeypatch.setattr(util, "DRAWS_TILE", tile)
        results.append(util.denoise_picture(autoencoder, picture, 1, posterior, 3))
    np.testing.assert_allclose(*(result.astype(int) for result, _ in results), atol=1)
    np.testing.assert_allclose(*(errors for _, errors in results), rtol=0.01)
    assert results[0][1].mean() > 1


def test_arithmetic_stays_within_the_bounds():
    one = simple.build_encoder(), simple.build_decoder()
    simple_count = multiply_accumulates(simple.build_autoencoder(*one))
    f, z, cells = simple.FILTERS, simple.LATENT_DIM, 16 * 16
    blocks = simple.ENCODER_BLOCKS + simple.DECODER_BLOCKS
    counted = cells * (2 * 12 * f + blocks * 2 * 9 * f * f + 3 * f * z) / 1e6
    assert simple_count == pytest.approx(counted)
    assert simple_count <= 110
    both = stack.stack_encoder(one[0]), stack.stack_decoder(one[1])
    f2, z2, blocks2 = stack.FILTERS, stack.LATENT_DIM, stack.ENCODER_BLOCKS + stack.DECODER_BLOCKS
    level_two = 8 * 8 * (4 * z * f2 + 4 * f2 * z + blocks2 * 2 * 9 * f2 * f2 + 3 * f2 * z2) / 1e6
    total = multiply_accumulates(simple.build_autoencoder(*both))
    assert total == pytest.approx(simple_count + level_two)
    assert total <= 220


def test_level_one_is_loaded_as_it_was_saved_in_the_precision_to_train_in(trained):
    models = stack.load_level_one(trained.out, NAME, "mixed_bfloat16")
    parts = ("z_encoder", "z_decoder", "detail_encoder", "detail_decoder")
    for part, model in zip(parts, models, strict=True):
        assert model.get_layer(f"{part.removeprefix('z_')}_0_a").compute_dtype == "bfloat16"
        assert {output.dtype for output in model.outputs} == {"float32"}
        saved = util.load_model(trained.out, NAME, part.split("_")[1]).get_layer(part)
        for ours, theirs in zip(model.get_weights(), saved.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def stacked(trained, tmp_path_factory):
    """A stack trained on the short training of the photographs."""
    out = shutil.copytree(trained.out, tmp_path_factory.mktemp("stacked") / "out")
    return run_of(stack, out, *TRAIN)


def test_run_tells_what_each_stage_brought(stacked):
    record = util.read_record(stacked.out, STACKED)
    stages = record["validation_psnr"]
    assert list(stages) == ["simple", "greedy", "joint"]
    for stage in stages.values():
        assert f"{stage:.2f} dB" in stacked.printed
    rows = rows_of(stacked.out / f"logs/{STACKED}.csv")
    expected = [("greedy", 1), ("joint", 2), ("joint", 3), ("detail", 4)]
    assert [(row["stage"], row["epoch"]) for row in rows] == expected
    kept = max(reversed(stages), key=stages.get)
    assert (record["best"] or {"stage": "simple"})["stage"] == kept
    assert ("The joint stage has not gained" in stacked.printed) == (kept != "joint")
    columns = [f"{label} {measure}" for measure in ("PSNR", "SSIM") for label in ("noisy", NAME, STACKED)]
    assert f"| sigma | {' | '.join(columns)} |" in stacked.printed
    assert record["base"] == NAME


def test_stacked_files_and_figures_are_those_of_simple(stacked):
    out = stacked.out
    simple_files, stacked_files = (
        {path.name for path in files_of(out) if name in path.name} for name in (NAME, STACKED)
    )
    assert stacked_files == {file.replace("simple", "stacked") for file in simple_files}
    with h5py.File(out / f"feature_maps/{STACKED}_test.h5") as file:
        assert file["features"].shape == (16, 6, 6, 12)
        assert file.attrs["run"] == STACKED
    assert legend_of(stacked.figures[f"{STACKED}_sweep.png"]) == ["noisy", NAME, STACKED]
    reconstructions = labels_of(stacked.figures[f"{STACKED}_reconstructions.png"])
    assert [label for label, _ in reconstructions if label][:3] == ["noisy, sigma 25", NAME, STACKED]
    levels = [label for label, _ in labels_of(stacked.figures[f"{STACKED}.png"]) if label]
    assert levels == ["level 1\nfrom 0", "level 2\nfrom 0"]
    _, _, (training, *_) = curves_of(stacked.figures[f"{STACKED}_history.png"])[0]
    assert training[0] == [1, 2, 3]  # the detail codes change no PSNR


def test_level_one_is_frozen_in_the_greedy_stage(stacked, tmp_path, monkeypatch):
    seen, fit = {}, simple.fit_stage

    def watch(vae, data, args, stage, *epochs):
        if stage == "detail":
            return []
        parts = [vae.encoder.get_layer("z_encoder"), vae.decoder.get_layer("z_decoder")]
        before = [weight for part in parts for weight in part.get_weights()]
        rows = fit(vae, data, args, stage, *epochs)
        after = [weight for part in parts for weight in part.get_weights()]
        seen[stage] = max(np.abs(a - b).max() for a, b in zip(before, after, strict=True))
        return rows

    monkeypatch.setattr(simple, "fit_stage", watch)
    monkeypatch.setattr(simple, "write_run", lambda *_: None)
    out = shutil.copytree(stacked.out, tmp_path / "out")
    printed_by(stack, *TINY, "--epochs=1", "--name=again", "--out", out)
    assert seen["greedy"] == 0
    assert seen["joint"] > 1e-4


def tuned(stacked, out, monkeypatch, epochs):
    """Go on from the stack: the record, what is printed, and whether the weights are those of the stack."""
    kept = {}
    monkeypatch.setattr(simple, "write_run", lambda args, models, *_: kept.update(record=_[-1], **models))
    shutil.copytree(stacked.out, out)
    options = [f"--epochs={epochs}", "--detail-epochs=0", f"--start={STACKED}", "--name=tuned", "--out", out]
    printed = printed_by(stack, *TINY, *options)
    saved = util.load_model(out, STACKED, "autoencoder")
    pairs = zip(kept["tuned"].get_weights(), saved.get_weights(), strict=True)
    return kept["record"], printed, all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def test_stack_goes_on_from_a_saved_one_without_a_greedy_stage(stacked, tmp_path, monkeypatch):
    record, _, same = tuned(stacked, tmp_path / "out", monkeypatch, epochs=0)
    stages, before = (run["validation_psnr"] for run in (record, util.read_record(stacked.out, STACKED)))
    assert list(stages) == ["simple", "start"]
    assert stages["start"] == pytest.approx(max(before["greedy"], before["joint"]), abs=0.01)
    assert same


@pytest.mark.parametrize("best", ["start", "joint"])
def test_stage_that_has_not_gained_is_taken_back(best, stacked, tmp_path, monkeypatch):
    told = {"simple": 20, "start": 30, "joint": 29 + 2 * (best == "joint")}
    measured = iter(told.values())
    monkeypatch.setattr(stack, "validation_score", lambda *_: next(measured))
    record, printed, same = tuned(stacked, tmp_path / "out", monkeypatch, epochs=1)
    assert same == (best == "start")
    assert ("The joint stage has not gained: the weights of 'start' are kept." in printed) == same
    assert record["validation_psnr"] == told
    assert (record["best"] is None) == same


def test_evaluate_shows_simple_beside_stacked(stacked, tmp_path):
    out = shutil.copytree(stacked.out, tmp_path / "out")
    again = printed_by(stack, "evaluate", "--dataset=photos", "--out", out)
    assert table_rows(again) == table_rows(stacked.printed)
    printed_by(stack, "evaluate", "--dataset=photos", "--size=32", "--images=2", "--out", out)
    record = util.read_record(out, STACKED)
    for part, draws in (("evaluation", ""), ("posterior", ", 25 draws")):  # the later keeps the earlier
        titles = [f"photos, 16 images of 24x24{draws}", f"photos, 2 images of 32x32{draws}"]
        assert list(record[part]) == titles


def test_picture_is_sampled_from_the_command_line(stacked, tmp_path):
    iio.imwrite(tmp_path / "a.png", random_images(9, 14, 3))
    arguments = ["denoise", tmp_path / "a.png", "--to", tmp_path / "b.png", "--out", stacked.out]
    code, printed, err = run("stack_autoencoder.py", *arguments, "--samples=2", f"--name={STACKED}")
    assert (code, err) == (0, "")
    assert re.search(r"b.png: 14x9, noise of .* removed, expected error ", printed)
    assert iio.imread(tmp_path / "b.png").shape == (9, 14, 3)
    assert iio.imread(tmp_path / "deviation/b.png").shape == (9, 14)
    line = told_line(printed_by, stack, *arguments, "--force")
    assert "stacked_photographs.json: not found; there is " in line
    assert NAME in line


def test_images_that_are_no_whole_cells(trained_copy, monkeypatch):
    monkeypatch.setattr(simple, "draw_results", lambda *_: None)
    options = ["--size=26", "--epochs=1", "--detail-epochs=0", "--out", trained_copy]
    printed_by(stack, *TINY, *options)
    model = util.load_model(trained_copy, STACKED, "autoencoder")
    assert util.denoise(model, np.zeros((1, 26, 26, 3), np.float32)).shape == (1, 26, 26, 3)
    (key,) = util.read_record(trained_copy, STACKED)["evaluation"]
    assert key.endswith("images of 24x24")


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("simple_stl10", "autoencoder_simple_stl10.json: not found; there is "),
        (STACKED, f"encoder_{STACKED}.json: not of a simple model; choose another --base"),
        ("double", "double: a stack would replace its own base; choose another --name"),
    ],
)
def test_base_that_is_missing_a_stack_or_the_run_itself_is_refused(stacked, base, told):
    line = told_line(printed_by, stack, *TRAIN, f"--base={base}", "--name=double", "--out", stacked.out)
    assert told in line
    shutil.rmtree(stacked.out / "logs/double.training", ignore_errors=True)


def test_base_of_files_of_two_runs_is_refused(trained_copy):
    save_run(trained_copy, "other")
    shutil.copy(trained_copy / "models/decoder_other.json", trained_copy / f"models/decoder_{NAME}.json")
    line = told_line(printed_by, stack, *TRAIN, "--out", trained_copy)
    assert line.startswith(f"{trained_copy}/models/decoder_{NAME}.json: not the file that {NAME} wrote")


@pytest.mark.usefixtures("unmeasured")
def test_stack_that_is_interrupted_everywhere_resumes_to_the_same_weights(trained_copy, stacked):
    command = TRAIN
    for reached in ("before stacking", "after the greedy stage", "Epoch 2/2"):
        told = stop_at(reached, stack, *command, "--out", trained_copy)
        assert told.endswith(f"stack_autoencoder.py --resume --name {STACKED} --out {trained_copy}")
        command = ["--resume", f"--name={STACKED}"]
    printed_by(stack, *command, "--out", trained_copy)
    for part in util.PARTS:
        assert_same_weights(trained_copy, stacked.out, STACKED, part)
    assert util.read_record(trained_copy, STACKED)["arguments"]["greedy_epochs"] == 1


WRONG_USAGE = "--greedy-epochs=0, --base=a/b, --sigma 50 5, --epochs=0, denoise, evaluate --images=-1"


@pytest.mark.parametrize("arguments", WRONG_USAGE.split(", "))
def test_wrong_usage_is_told(arguments):
    def parse(argv):
        return simple.parse_args(argv, "stacked", stack.__doc__, stack.add_stack_options)

    assert "error: " in usage_error(parse, arguments.split())
