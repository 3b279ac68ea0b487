"""Train a classifier on clean images, and measure what noise and denoising do to it.

    python classifier.py                               # CIFAR-10
    python classifier.py --dataset photos              # built-in photographs, no download
    python classifier.py --dataset animals             # a folder with a subfolder of images for each class
    python classifier.py --resume                      # go on after an interruption
    python classifier.py evaluate                      # measure the saved classifier again

The classifier never sees noise nor a denoised image in training: what it loses between clean and denoised
images is a verdict on the denoiser. Prints its accuracy on clean, noisy and denoised test images and the
pairs that it confuses most. Writes, under the run's name (`classifier_cifar10`), model and weights,
`figures/NAME_*.png` (confusion matrices, accuracy against sigma, history), a log and a run record. A fault is
a `DataError` or `ModelError`, both `OSError`, whose message is one line that names the file and the remedy.

On CIFAR-10 the defaults take 236 minutes on two CPU cores with AVX512-BF16, then 10 minutes to measure.

The network is that of Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, a VGG-like one
behind a fixed whitening of 2x2 patches.
"""

from functools import partial

import util
from load_data import SIGMAS, Batches, add_data_options, add_noise, check_labelled, dataset_name, load_data

import keras
import numpy as np
from keras import layers, ops
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

# architecture: 4.6 million parameters, 302 million multiply-accumulates for a 32x32 image
WIDTHS = (128, 384, 384)
WHITENED_IMAGES = 5000  # that the whitening is computed from
WHITENING_EPSILON = 5e-4  # added to the variances, so that the faintest patterns are not blown up

# optimization
ENLARGED = (0.5, 0.5, 0.25)  # share of the images in each round; further ones as the last
ROUNDS = len(ENLARGED)
EPOCHS = 45  # of all rounds together
BATCH_SIZE = 500
LEARNING_RATE = 0.12  # share of its norm that the first step turns a kernel by
LATER_ROUNDS_RATE = 0.5  # share of the learning rate that they begin with
MOMENTUM = 0.6
ADAM_SHARE = 0.015  # of the learning rate, for all that is no kernel
LABEL_SMOOTHING = 0.1
MEASURED_BATCHES = 40  # for the statistics of averaged weights
MONITOR = "val_loss"  # by the accuracy of 1,000 images, the best epoch would be chance

# what is measured and shown
SHOWN_SIGMA = 25  # of the confusion matrices
CONFUSED_PAIRS = 5
CHUNK = 500  # images of up to util.BATCH_SIDE that are computed at a time


def whitening(images):
    """Kernel and bias of a convolution that whitens 2x2 patches: both signs of every principal component.

    Args:
        images: uint8 array (N, H, W, 3).

    Returns:
        float32 arrays (2, 2, 3, 24) and (24,).
    """
    cells = images[:, : images.shape[1] // 2 * 2, : images.shape[2] // 2 * 2]
    count, height, width, _ = cells.shape
    cells = cells.reshape(count, height // 2, 2, width // 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = util.to_float(cells.reshape(-1, 12))
    variances, components = np.linalg.eigh(np.cov(patches, rowvar=False))
    kernel = components / np.sqrt(variances + WHITENING_EPSILON)
    kernel = np.concatenate([kernel, -kernel], axis=1)
    return kernel.reshape(2, 2, 3, -1).astype(np.float32), -(patches.mean(axis=0) @ kernel).astype(np.float32)


def convolution(x, width, name, halve=False):
    """3x3 convolution, batch normalization, GELU; with `halve`, 2x2 max-pooling after the convolution."""
    x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=name)(x)
    if halve:
        x = layers.MaxPooling2D(name=f"{name}_pool")(x)
    x = layers.BatchNormalization(momentum=0.9, scale=False, name=f"{name}_norm")(x)
    return layers.Activation("gelu", name=f"{name}_gelu")(x)


def build_classifier(shape, classes, widths=WIDTHS):
    """Classifier of images (N, *shape) in [0, 1]; `widths` are the channels of each pair of convolutions."""
    inputs = keras.Input(shape, name="images")
    x = layers.Conv2D(24, 2, activation="gelu", trainable=False, name="whitening")(inputs)
    for level, width in enumerate(widths, start=1):
        x = convolution(x, width, f"convolution_{level}a", halve=True)
        x = convolution(x, width, f"convolution_{level}b")
    x = layers.GlobalMaxPooling2D(name="maximum")(x)
    x = layers.Dense(
        classes, activation="softmax", kernel_initializer="zeros", dtype="float32", name="probabilities"
    )(x)
    return keras.Model(inputs, x, name="classifier")


class LabelledBatches(Batches):
    """Feed a classifier with clean images, shifted, mirrored, zoomed or cut out of, and with one-hot labels.

    Mirroring alternates: what one epoch mirrors, the next one does not, so that two epochs show each image
    both ways (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024).

    `images` are uint8 (N, H, W, 3), `labels` int64 (N,); a share of `enlarged` is enlarged.
    """

    def __init__(self, images, labels, classes, batch_size, seed=0, enlarged=0.5):
        self.enlarged = enlarged
        self.one_hot = np.eye(classes, dtype=np.float32)[labels]
        self.mirrored_first = np.random.default_rng(seed).random(len(images)) < 0.5
        super().__init__(images, batch_size, seed)

    def prepare(self, index):
        chosen, batch = self.take(index)
        mirrored = self.mirrored_first[chosen] ^ (self.epoch % 2 == 1)
        batch[mirrored] = batch[mirrored, :, ::-1]
        batch = shift_zoom_or_cut_out(batch, self.random(index), self.enlarged)
        return util.to_float(batch), self.one_hot[chosen]


def shift_zoom_or_cut_out(images, rng, share):
    """Shift images (N, side, side, 3), uint8, by up to a sixteenth of their side; the rest mirrors them.

    A share of them is enlarged, by up to a third. In the others a square of a quarter of their side becomes
    grey (DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017).
    """
    side, margin = images.shape[1], images.shape[1] // 16
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="reflect")
    enlarged = rng.random(len(images)) < share
    shown = np.where(enlarged, side * rng.uniform(0.75, 1, len(images)), side)
    corners = rng.random((len(images), 2)) * (side + 2 * margin - shown)[:, None]
    # whole pixels where nothing is enlarged: those images stay sharp
    corners = np.where(enlarged[:, None], corners, corners.round())
    hole = side // 4
    holes = rng.integers(0, side - hole + 1, (len(images), 2))
    result = np.empty_like(images)
    for index, (image, (left, top), width) in enumerate(zip(padded, corners, shown, strict=True)):
        box = (left, top, left + width, top + width)
        result[index] = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box)
        if not enlarged[index]:
            row, column = holes[index]
            result[index, row : row + hole, column : column + hole] = 128
    return result


class FixedNormMuon(util.ConvolutionMuon):
    """Muon that gives a kernel the norm sqrt(out) again after every step.

    Batch normalization makes the norm meaningless; the learning rate then is about the share of it that the
    kernel turns by.
    """

    def _muon_update_step(self, gradient, variable, lr, m):
        super()._muon_update_step(gradient, variable, lr, m)
        norm = ops.sqrt(ops.sum(ops.square(variable)))
        self.assign(variable, variable * (variable.shape[-1] ** 0.5 / norm))


def build_optimizer(learning_rate, steps):
    """Muon whose learning rate falls linearly to zero over `steps`."""
    return FixedNormMuon(
        keras.optimizers.schedules.PolynomialDecay(learning_rate, steps, end_learning_rate=0.0),
        adam_lr_ratio=ADAM_SHARE,
        momentum=MOMENTUM,
        rms_rate=None,
        weight_decay=None,
        adam_weight_decay=None,
    )


def average_weights(model, weights, batches):
    """Give a model the mean of several weights, and batch normalization the statistics that go with it.

    From Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging Weights Leads to Wider Optima and Better
    Generalization", 2018. Weights are lists as of `get_weights`; `batches` feed the statistics.
    """
    model.set_weights([np.mean(versions, axis=0) for versions in zip(*weights, strict=True)])
    for index in range(MEASURED_BATCHES):
        model(batches[index % len(batches)][0], training=True)


def train_round(model, batches, validation, args, number, epochs_before):
    """Train with a learning rate that falls to zero, up to the best weights; the metrics of each epoch.

    Goes on from a checkpoint that is there. `number` counts the rounds from 1.
    """
    epochs = args.epochs * number // args.rounds - args.epochs * (number - 1) // args.rounds
    rate = args.learning_rate * (1 if number == 1 else LATER_ROUNDS_RATE)
    model.compile(
        optimizer=build_optimizer(rate, epochs * len(batches)),
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING),
        metrics=["accuracy"],
    )
    shuffle = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.go_to(epoch))
    folder = util.training_folder(args.out, args.name)
    rows = util.fit(model, batches, validation, epochs, folder, MONITOR, [shuffle], f"round_{number}")
    return [{"round": number} | row | {"epoch": epochs_before + row["epoch"]} for row in rows]


def train(args, data):
    """Train a classifier on the clean training split, in rounds, and average their weights.

    Returns:
        Trained classifier, float32 and uncompiled, the metrics, a dict for each epoch, and accuracy and loss
        on the validation split.
    """
    images, classes = data.images["train"], len(data.class_names)
    feed = partial(LabelledBatches, images, data.labels["train"], classes, args.batch_size)
    validation = util.to_float(data.images["validation"]), np.eye(classes)[data.labels["validation"]]
    model = build_classifier(images.shape[1:], classes, args.widths)
    if args.start:
        util.start_from(model, args.out, args.start)
    else:
        model.get_layer("whitening").set_weights(whitening(data.first("train", WHITENED_IMAGES)))
    rows, weights = [], []
    for number in range(1, args.rounds + 1):
        batches = feed(seed=args.seed + number - 1, enlarged=ENLARGED[min(number, ROUNDS) - 1])
        rows += train_round(model, batches, validation, args, number, len(rows))
        weights.append(model.get_weights())
    if args.rounds > 1:
        average_weights(model, weights, feed(seed=args.seed + args.rounds))
    loss, share = model.evaluate(*validation, verbose=0)
    print(f"Validation, with the weights that are saved: accuracy {share:.4f}, loss {loss:.4f}")
    return util.portable_copy(model), rows, {"accuracy": share, "loss": loss}


def predict(model, images):
    """The most probable class of each image, int64 (N,)."""
    count = util.batch_size_for(images, CHUNK)
    starts = range(0, len(images), count)
    chunks = [model.predict_on_batch(util.to_float(images[start : start + count])) for start in starts]
    return np.concatenate(chunks).argmax(axis=1)


def predict_all(model, clean, denoisers):
    """Predictions for clean, noisy and denoised images (N, H, W, 3), uint8.

    Returns:
        Dict by (sigma, kind) of classes (N,); kind is `clean` (sigma 0), `noisy`, or a denoiser's name.
    """
    advance = util.progress(1 + len(SIGMAS) * (1 + len(denoisers)), "sets of test images classified")
    predictions = {(0, "clean"): predict(model, clean)}
    advance()
    for sigma in SIGMAS:
        noisy = add_noise(clean, sigma)
        predictions[sigma, "noisy"] = predict(model, noisy)
        advance()
        for name, denoiser in denoisers.items():
            predictions[sigma, name] = predict(model, util.denoise(denoiser, noisy))
            advance()
    return predictions


def accuracy(labels, predicted):
    """Accuracy and the ends of its 95 % interval (Wilson 1927), in percent."""
    right = int(np.sum(labels == predicted))
    interval = binomtest(right, len(labels)).proportion_ci(method="wilson")
    return tuple(100 * float(share) for share in (right / len(labels), interval.low, interval.high))


def accuracy_rows(measured):
    """Rows of the table: for each sigma the accuracy of each kind, with its interval.

    `measured` is what `accuracy` returns, by (sigma, kind).
    """
    rows = {sigma: {"sigma": sigma} for sigma in SIGMAS}
    for (sigma, kind), (share, low, high) in measured.items():
        if sigma:
            rows[sigma][kind] = f"{share:.2f} ({low:.2f}-{high:.2f})"
    return list(rows.values())


def confusion(labels, predicted, class_names):
    """Confusion matrix (classes, classes) in percent of each true class."""
    return 100 * confusion_matrix(labels, predicted, labels=range(len(class_names)), normalize="true")


def confused_pairs(labels, predicted, class_names):
    """The commonest mistakes: (share of the true class in percent, true name, predicted name), falling."""
    shares = confusion(labels, predicted, class_names)
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:CONFUSED_PAIRS]
    pairs = [divmod(int(index), len(class_names)) for index in order]
    return [(shares[a, b], class_names[a], class_names[b]) for a, b in pairs if shares[a, b]]


def confusion_figure(labels, predicted, class_names, title):
    """The confusion matrix as a picture."""
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    display = ConfusionMatrixDisplay(confusion(labels, predicted, class_names), display_labels=class_names)
    display.plot(ax=figure.subplots(), values_format=".0f", cmap="Blues", xticks_rotation=45)
    display.im_.set_clim(0, 100)
    display.ax_.set_title(f"{title}: {accuracy(labels, predicted)[0]:.2f} %", fontsize=10)
    display.ax_.set(xlabel="predicted", ylabel="true")
    return figure


def sigma_figure(measured, title):
    """Accuracy against sigma, a curve for each kind of image; `measured` as `accuracy_rows` takes it."""
    curves = {"clean": ((SIGMAS[0], SIGMAS[-1]), 2 * [measured[0, "clean"][0]])}
    for kind in dict.fromkeys(kind for sigma, kind in measured if sigma):
        curves[kind] = SIGMAS, [measured[sigma, kind][0] for sigma in SIGMAS]
    return util.curves_figure([("sigma", "accuracy in %", curves)], title)


def evaluate(draft, args, model, denoisers, data):
    """Measure a classifier, print the tables, write the figures; what the run record says of it."""
    labels, count = data.labels["test"], len(data.labels["test"])
    predictions = predict_all(model, data.images["test"], denoisers)
    measured = {key: accuracy(labels, predicted) for key, predicted in predictions.items()}
    share, low, high = measured[0, "clean"]
    print(f"Accuracy in % on the {count:,} test images of {data.name}, with 95 % intervals:")
    print(f"clean: {share:.2f} ({low:.2f}-{high:.2f})")
    print(util.format_table(accuracy_rows(measured)))
    shown = {"clean": (0, "clean"), "noisy": (SHOWN_SIGMA, "noisy")}
    if denoisers:
        shown["denoised"] = SHOWN_SIGMA, list(denoisers)[-1]
    figures = {"sigma": sigma_figure(measured, f"{args.name}, {count:,} test images")}
    for kind, (sigma, source) in shown.items():
        predicted = predictions[sigma, source]
        pairs = confused_pairs(labels, predicted, data.class_names)
        title = f"{source}, sigma {sigma}" if sigma else source
        mistakes = ", ".join(f"{true} for {other} {share:.1f} %" for share, true, other in pairs)
        print(f"most confused, {title}: {mistakes or 'none'}")
        figures[f"{kind}_confusion"] = confusion_figure(labels, predicted, data.class_names, title)
    util.save_figures(draft, args.name, figures)
    results = [
        {"sigma": sigma, "images": kind, "accuracy": share, "low": low, "high": high}
        for (sigma, kind), (share, low, high) in measured.items()
    ]
    return {f"{data.name}, {count} images": results}


def load_fitting(args, data):
    """Load a saved classifier of such classes and such images, and its record."""
    model, record = util.load_model(args.out, args.name), util.read_record(args.out, args.name)
    path = args.out / "logs" / f"{args.name}.json"
    if record.get("class_names") != list(data.class_names):
        raise util.ModelError(f"{path}: missing, or of other classes than {data.name}; choose another --name")
    expected, given = model.input_shape[1:], data.images["test"].shape[1:]
    if expected != given:
        raise util.ModelError(f"{path}: classifies {expected}, not {given}; choose another --size")
    return model, record


def write_run(args, model, rows, validation, denoisers, data):
    """Write everything that a training run leaves behind, all at once."""
    with util.publishing(args.out, args.name) as draft:
        util.save_model(draft, model, args.name)
        util.write_csv(draft / f"logs/{args.name}.csv", rows)
        history = util.history_figure(rows, {"loss": "loss", "accuracy": "accuracy"}, args.name)
        util.save_figures(draft, args.name, {"history": history})
        record = util.describe_run(args, rows) | {"data": data.identity}
        record |= {"training_images": len(data.images["train"]), "class_names": data.class_names}
        rounds = [[row for row in rows if row["round"] == number] for number in range(1, args.rounds + 1)]
        record["best"] = [util.best_row(epochs, MONITOR) for epochs in rounds]
        record["validation"] = validation
        record["evaluation"] = evaluate(draft, args, model, denoisers, data)
        util.write_record(draft, args.name, record)
    print(f"Written to {args.out}: model, weights, figures and logs of {args.name}")


def evaluate_saved(args, data, denoisers):
    """Evaluate a saved classifier, write its figures and add the result to the run record."""
    model, record = load_fitting(args, data)
    with util.publishing(args.out, args.name) as draft:
        evaluation = record.get("evaluation", {}) | evaluate(draft, args, model, denoisers, data)
        util.write_record(draft, args.name, record | {"evaluation": evaluation})
    print(f"Written to {args.out}: record and figures of {args.name}")


def default_name(args):
    return f"classifier_{dataset_name(args.dataset)}"


def parse_args(argv=None):
    argv, parser, add_verb = util.verb_parser(argv, __doc__)
    train_help = "train a classifier and measure it; a FOLDER must have a subfolder for each class"
    train_parser = add_verb("train", help=train_help, description=train_help)
    evaluate_parser = add_verb("evaluate", help="measure a saved classifier")
    add_data_options(train_parser)
    add_data_options(evaluate_parser)
    util.add_training_options(train_parser, EPOCHS, BATCH_SIZE)
    util.add_saved_run_options(evaluate_parser)
    add = train_parser.add_argument
    rounds = "parts of the training; in each the rate falls to zero, and their weights are averaged"
    add("--rounds", type=util.number(int, 1), default=ROUNDS, help=rounds)
    add("--learning-rate", type=util.number(float, 0), default=LEARNING_RATE, help="at the start")
    widths = {"nargs": len(WIDTHS), "default": WIDTHS, "metavar": ("W1", "W2", "W3")}
    add("--widths", type=util.number(int, 1), **widths, help="channels of each pair of convolutions")
    denoisers = "runs that denoise the test images (default: simple_DATASET and stacked_DATASET, if there)"
    for verb in (train_parser, evaluate_parser):
        verb.add_argument("--denoisers", type=util.run_name, nargs="+", metavar="NAME", help=denoisers)
    args = util.parse_resumable(parser, train_parser, argv, default_name)
    if args.verb == "train" and args.epochs < args.rounds:
        train_parser.error(f"argument --epochs: {args.epochs} are too few for {args.rounds} rounds")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.denoisers is None:
        args.denoisers = util.denoiser_runs(args.out, dataset_name(args.dataset), "autoencoder")
    denoisers = {name: util.load_model(args.out, name, "autoencoder") for name in args.denoisers}
    if args.verb == "evaluate":
        record = util.read_record(args.out, args.name)
        size = args.size or util.size_of_run(record, dataset_name(args.dataset))
        evaluate_saved(args, load_data(args.dataset, args.data_dir, size), denoisers)
        return
    data = load_data(args.dataset, args.data_dir, args.size, args.limit)
    check_labelled(data, args.dataset, args.limit)
    with util.training(__file__, args, data.checksums):
        write_run(args, *train(args, data), denoisers, data)


if __name__ == "__main__":
    util.run_script(main)
