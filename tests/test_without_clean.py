"""Learning from pictures that are noisy already, `--noise own`."""

import load_data
import simple_autoencoder as simple
import stack_autoencoder as stack
import util

import keras
import numpy as np
import pytest
from conftest import TINY, labels_of, pixels_of, printed_by, run_of, small_models, told_line, usage_error

OWN = ["--noise=own", "--epochs=1", *(option for option in TINY if not option.startswith("--dataset"))]


def ramps(count, side, noise):
    """Clean images, each a ramp of grey of its own, and the same with white noise, uint8."""
    rng = np.random.default_rng(0)
    rows, columns = np.meshgrid(*2 * [np.linspace(-1, 1, side)], indexing="ij")
    slopes = rng.uniform(-60, 60, (2, count, 1, 1))
    clean = np.repeat((128 + slopes[0] * rows + slopes[1] * columns)[..., None], 3, axis=3)
    noisy = np.clip(clean + rng.normal(0, noise, clean.shape), 0, 255)
    return clean.astype(np.uint8), noisy.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of noisy pictures."""
    scans = tmp_path_factory.mktemp("data") / "scans"
    for index, picture in enumerate(ramps(12, 96, 25)[1]):
        load_data.write_pixels(scans / f"{index}.png", picture)
    return scans


@pytest.fixture(scope="module")
def learnt(folder, tmp_path_factory):
    return run_of(simple, tmp_path_factory.mktemp("own"), "--dataset", folder, *OWN)


@pytest.mark.parametrize("distance", [1, 2])
def test_neighbours(distance):
    side = 2 * distance
    places = np.stack(np.meshgrid(np.arange(32), np.arange(32), indexing="ij"), axis=-1)
    images = np.broadcast_to(places, (40, 32, 32, 2)).astype(np.float32)
    pairs = load_data.draw_neighbours([images, 2 * images], distance, keras.random.SeedGenerator(0))
    (first, second), twice = [[np.asarray(image) for image in pair] for pair in pairs]
    np.testing.assert_array_equal(twice, (2 * first, 2 * second))
    for chosen in (first, second):
        np.testing.assert_array_equal(chosen // side, images[:, : 32 // side, : 32 // side])
        drawn, counts = np.unique((chosen % side).reshape(-1, 2), axis=0, return_counts=True)
        assert len(drawn) == side**2  # and evenly
        assert counts.min() > 0.8 * counts.mean()
    steps, counts = np.unique((second - first).reshape(-1, 2), axis=0, return_counts=True)
    assert steps.tolist() == [[-distance, 0], [0, -distance], [0, distance], [distance, 0]]
    assert counts.min() > 0.8 * counts.mean()


def test_loss_of_the_identity():
    """Denoised by the identity, neighbours differ in the noisy image as they do in the denoised one."""
    vae = simple.NeighbourVAE(*small_models(), kl_weight=0)
    noisy = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    outputs = vae(noisy)
    state = vae.random.state.numpy()
    loss = vae.compute_loss(None, noisy, outputs, training=False)
    vae.random.state.assign(state)
    ((first, second),) = load_data.draw_neighbours([noisy], 1, vae.random)
    mse = np.square(np.asarray(first) - np.asarray(second)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, np.mean(np.log(mse + 255**-2) / 2), rtol=1e-4)


def test_learns_to_denoise():
    clean, noisy = ramps(64, 16, 50)
    images = util.to_float(noisy)
    vae = simple.NeighbourVAE(*small_models(), kl_weight=1e-3)
    vae.compile(optimizer=simple.build_optimizer(2e-3, 40))
    vae.fit(images, images, batch_size=16, epochs=10, verbose=0)
    denoised = util.to_uint8(np.asarray(vae(images)[0]))
    assert util.psnr(clean, denoised).mean() > util.psnr(clean, noisy).mean() + 3


def test_a_run_tells_no_psnr(learnt):
    record = util.read_record(learnt.out, "simple_scans")
    assert "evaluation" not in record and "posterior" not in record and "dB" not in learnt.printed
    assert "val_loss" in record["best"]
    labels = {label for label, caption in labels_of(learnt.figures["simple_scans_reconstructions.png"])}
    assert labels - {""} == {"noisy", "simple_scans"}
    frames = learnt.figures["simple_scans_group.gif"]
    assert all(not caption for frame in frames for _, caption in labels_of(frame))
    noisy, denoised = pixels_of(learnt.figures["simple_scans_picture.png"])
    assert 64 < noisy.mean() < 192 and np.abs(noisy - denoised.astype(float)).mean() < 64


def test_a_stack_on_it(learnt, folder):
    printed = printed_by(stack, "--dataset", folder, *OWN, "--greedy-epochs=1", "--out", learnt.out)
    assert "validation_loss of simple_scans" in printed and "dB" not in printed
    losses = util.read_record(learnt.out, "stacked_scans")["validation_loss"]
    assert losses.keys() == {"simple", "greedy", "joint"}
    assert losses["joint"] <= losses["simple"]


def test_what_it_cannot_say(learnt, folder, tmp_path):
    run = ["--name=simple_scans", "--out", str(learnt.out)]
    target = ["--to", str(tmp_path)]
    assert "noisy pictures alone" in told_line(simple.main, ["evaluate", *run])
    assert "--samples" in told_line(simple.main, ["denoise", str(folder), "--samples=2", *run, *target])
    assert "12 written" in printed_by(simple, "denoise", folder, *run, *target)
    pairs = ["--pictures", folder, "--noisy", folder]
    assert "mean of 12" in printed_by(simple, "evaluate", *pairs, *run)


def test_wrong_use(folder, tmp_path):
    few = tmp_path / "few"
    load_data.write_pixels(few / "small.png", ramps(1, 40, 25)[1][0])
    assert "lower --size" in told_line(simple.main, ["--dataset", str(few), *OWN, "--out", str(tmp_path)])
    assert "alone" in usage_error(simple.parse_args, ["--noise", "own", "white", "--dataset", str(folder)])
    assert "--dataset" in usage_error(simple.parse_args, ["--noise", "own"])
