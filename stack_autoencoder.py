"""Stack a second variational level on a trained single-layer autoencoder.

    python simple_autoencoder.py                       # first: level one
    python stack_autoencoder.py                        # CIFAR-10, on simple_cifar10
    python stack_autoencoder.py --dataset photos       # on simple_photos
    python stack_autoencoder.py --resume               # go on after an interruption
    python stack_autoencoder.py evaluate               # measure noisy, simple and stacked side by side
    python stack_autoencoder.py --start stacked_cifar10 --dataset holiday/   # go on with your own pictures

The second level is a variational autoencoder of level one's feature maps, on a coarser grid and wider: one
code for every 4x4 pixels, where the receptive field soon covers a whole object. It is first trained alone,
with level one frozen (greedy, as in Vincent et al., "Stacked Denoising Autoencoders", JMLR 2010), then both
levels are tuned together. Level one's code still reaches the decoder beside level two's, so that the stack
starts at the simple model's PSNR. Last, the detail codes of both levels are trained. Writes the same files as
`simple_autoencoder.py`, under the name `stacked_DATASET`. A training of CIFAR-10 with the defaults takes 65
minutes or more on two CPU cores with AVX512-BF16.
"""

import simple_autoencoder as simple
import util
from load_data import OWN, dataset_name, noise_shares, validation_pair

import keras
from keras import layers

# architecture of level two: with level one 209 million multiply-accumulates for a 32x32 image
FILTERS = 128
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3
LATENT_DIM = 128
DETAIL_FILTERS, DETAIL_BLOCKS = 64, 3  # of encoder and decoder of its detail code
SURROUNDINGS = 17  # side in cells of the square whose texture tells a detail code's variance

# optimization
GREEDY_EPOCHS = 1
EPOCHS = 24  # of the joint tuning
DETAIL_EPOCHS = 3  # level one's detail code is trained already
BATCH_SIZE = 64  # with 16 the joint tuning loses 0.28 dB at first, and just wins it back
LEARNING_RATE = 5e-4  # twice that made the loss infinite with Adam in batches of 16; not tuned since
KL_WEIGHT = 1e-4  # with 1e-3, 0.3 dB less at sigma 75


def load_level_one(out, name, precision):
    """Load the parts of a trained simple model.

    Args:
        out: Folder that holds `models/`, `weights/` and `logs/`.
        name: Of its run.
        precision: To train in, `float32` or `mixed_bfloat16`.

    Returns:
        Encoder and decoder of z, then those of the detail code.
    """
    saved = {part: util.load_model(out, name, part, precision) for part in ("encoder", "decoder")}
    try:
        models = [saved[part].get_layer(f"{code}_{part}") for code in ("z", "detail") for part in saved]
    except ValueError:
        models = []
    if not models or len(saved["decoder"].inputs) > 2:
        path = out / "models" / f"encoder_{name}.json"
        raise util.ModelError(f"{path}: not of a simple model; choose another --base")
    return models


def stack_encoder(level_one, filters=FILTERS, blocks=ENCODER_BLOCKS, latent_dim=LATENT_DIM):
    """Encoder: noisy image (N, H, W, 3), H and W multiples of 4, to [z_mean, z_log_var, z2_mean, z2_log_var].

    Args:
        level_one: Encoder of a simple model; its z_mean is what level two encodes.
        filters: Channels of level two.
        blocks: Residual blocks.
        latent_dim: Channels of the second code, (N, H/4, W/4, latent_dim).
    """
    noisy = keras.Input((None, None, 3), name="noisy")
    z_mean, z_log_var = level_one(noisy)
    x = layers.Conv2D(filters, 2, strides=2, name="to_coarse")(z_mean)
    x = simple.residual_blocks(x, filters, blocks, "encoder2")
    return keras.Model(noisy, [z_mean, z_log_var, *simple.code_heads(x, latent_dim, "z2")], name="z_encoder")


def stack_decoder(level_one, filters=FILTERS, blocks=DECODER_BLOCKS, latent_dim=LATENT_DIM):
    """Decoder: codes [z (N, h, w, c), z2 (N, h/2, w/2, latent_dim)] to image (N, 2h, 2w, 3).

    What z2 decodes to is added to z, by a transposed convolution that starts at zero: at first the stack
    does what level one alone does.

    Args:
        level_one: Decoder of a simple model.
        filters: Channels of level two.
        blocks: Residual blocks.
        latent_dim: Channels of z2.
    """
    z = keras.Input(level_one.inputs[0].shape[1:], name="z")
    z2 = keras.Input((None, None, latent_dim), name="z2")
    x = layers.Conv2D(filters, 1, name="from_code2")(z2)
    x = simple.residual_blocks(x, filters, blocks, "decoder2")
    fine = layers.Conv2DTranspose(z.shape[-1], 2, strides=2, kernel_initializer="zeros", name="to_fine")(x)
    return keras.Model([z, z2], level_one(layers.Add(name="ladder")([z, fine])), name="z_decoder")


def stack_detail_encoder(level_one, z2_dim, filters=DETAIL_FILTERS, blocks=DETAIL_BLOCKS):
    """Detail encoder: [noisy image, z_mean, z2_mean] to [detail_log_var, detail2_log_var].

    How much the noise has destroyed is seen best from how much texture it has left, over a wide square: the
    mean of features there shifts the log-variances of both levels. It is squeeze-and-excitation (Hu, Shen,
    Sun, CVPR 2018) of surroundings instead of the whole image.

    Args:
        level_one: Detail encoder of a simple model.
        z2_dim: Channels of z2.
        filters: Channels of level two, and of its detail code, (N, H/4, W/4, filters).
        blocks: Residual blocks.
    """
    noisy, z_mean = (keras.Input(code.shape[1:], name=code.name) for code in level_one.inputs)
    z2_mean = keras.Input((None, None, z2_dim), name="z2_mean")
    x = simple.detail_features(z_mean, z2_mean, filters, blocks, "detail2")
    texture = layers.Conv2D(filters, 1, activation="relu", name="detail2_texture")(x)
    average = layers.AveragePooling2D(SURROUNDINGS, 1, padding="same", dtype="float32", name="detail2_around")
    around = layers.Conv2D(filters, 1, activation="relu", name="detail2_excitation")(average(texture))
    shift = layers.Conv2D(filters, 1, kernel_initializer="zeros", name="detail2_shift")(around)
    x = layers.Add(name="detail2_shifted")([x, shift])
    options = {"strides": 2, "kernel_initializer": "zeros", "dtype": "float32"}
    fine = layers.Conv2DTranspose(z_mean.shape[-1], 2, name="log_var_to_fine", **options)(around)
    log_var = layers.Add(dtype="float32", name="log_var_ladder")([level_one([noisy, z_mean]), fine])
    log_vars = [log_var, simple.log_var_head(x, filters, "detail2")]
    return keras.Model([noisy, z_mean, z2_mean], log_vars, name="detail_encoder")


def stack_detail_decoder(level_one, filters=DETAIL_FILTERS, blocks=DETAIL_BLOCKS):
    """Detail decoder: [detail (N, h, w, c), detail2 (N, h/2, w/2, filters)] to what they add, (N, 2h, 2w, 3).

    What detail2 decodes to is added to detail, as in `stack_decoder`; without biases, as at level one.

    Args:
        level_one: Detail decoder of a simple model.
        filters: Channels of level two.
        blocks: Residual blocks.
    """
    detail = keras.Input(level_one.inputs[0].shape[1:], name="detail")
    detail2 = keras.Input((None, None, filters), name="detail2")
    x = simple.residual_blocks(detail2, filters, blocks, "detail2_decoder", use_bias=False)
    options = {"strides": 2, "use_bias": False, "kernel_initializer": "zeros"}
    fine = layers.Conv2DTranspose(detail.shape[-1], 2, name="detail_to_fine", **options)(x)
    image = level_one(layers.Add(name="detail_ladder")([detail, fine]))
    return keras.Model([detail, detail2], image, name="detail_decoder")


def validation_score(vae, data, args):
    """Mean PSNR in dB of the autoencoder, as it would be saved, on the noisy validation images.

    Without clean images it is the loss.
    """
    noisy, clean = validation_pair(data.images["validation"], noise_shares(args.noise), args.sigma)
    if args.noise == [OWN]:
        vae.compile()
        return vae.evaluate(noisy, clean, batch_size=args.batch_size, verbose=0, return_dict=True)["loss"]
    model = util.portable_copy(simple.build_autoencoder(vae.encoder, vae.decoder))
    return float(util.psnr(util.to_uint8(clean), util.denoise(model, noisy)).mean())


def add_stack_options(parser):
    """Add the options that `simple_autoencoder.py` does not have, and the defaults that differ."""
    parser.add_argument(
        "--base", type=util.run_name, help="simple model to stack on (default: simple_DATASET)"
    )
    parser.add_argument(
        "--greedy-epochs",
        type=util.number(int, 1),
        default=GREEDY_EPOCHS,
        help="passes with level one frozen, without --start",
    )
    parser.set_defaults(
        filters=FILTERS,
        latent_dim=LATENT_DIM,
        epochs=EPOCHS,
        detail_epochs=DETAIL_EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        kl_weight=KL_WEIGHT,
    )


def train(args, data, base):
    """Train z of level two greedily, then of both levels jointly, then the detail codes.

    Prints the validation PSNR after each stage.

    Returns:
        Encoder, decoder and autoencoder, metrics of all epochs, and what the run record says of the stages.
    """
    z_encoder, z_decoder, detail_encoder, detail_decoder = load_level_one(args.out, base, args.precision)
    encoder = stack_encoder(z_encoder, args.filters, ENCODER_BLOCKS, args.latent_dim)
    decoder = stack_decoder(z_decoder, args.filters, DECODER_BLOCKS, args.latent_dim)
    detail = stack_detail_encoder(detail_encoder, args.latent_dim), stack_detail_decoder(detail_decoder)
    joined = simple.join_encoders(encoder, detail[0]), simple.join_decoders(decoder, detail[1])
    vae = simple.build_vae(encoder, decoder, args)
    score, unit = ("validation_loss", "") if args.noise == [OWN] else ("validation_psnr", " dB")
    rows, scores, weights = [], {}, {}

    def note(stage, words):
        weights[stage], scores[stage] = vae.get_weights(), validation_score(vae, data, args)
        print(f"{score} {words}: {scores[stage]:.2f}{unit}", flush=True)

    note("simple", f"of {base}, before stacking")
    plan = {"greedy": args.greedy_epochs, "joint": args.epochs}
    if args.start:  # both levels are there already
        simple.load_start(args, *joined)
        weights.clear()  # level one alone is nothing to fall back to
        note("start", f"of {args.start}")
        plan = {"joint": args.epochs} if args.epochs else {}
    for stage, epochs in plan.items():
        z_encoder.trainable = z_decoder.trainable = stage != "greedy"
        rows += simple.fit_stage(vae, data, args, stage, epochs, len(rows))
        note(stage, f"after the {stage} stage")
    compared = [{"stage": stage, vae.monitor: scores[stage]} for stage in reversed(weights)]  # latest first
    kept = util.best_row(compared, vae.monitor)["stage"]
    best = util.best_row([row for row in rows if row["stage"] == kept], vae.monitor)
    if kept != list(weights)[-1]:
        print(f"The joint stage has not gained: the weights of '{kept}' are kept.")
        vae.set_weights(weights[kept])
    rows += simple.fit_detail(vae, detail, joined, data, args, len(rows))
    record = {"base": base, score: scores, "best": best}
    return *joined, simple.build_autoencoder(encoder, decoder), rows, record


def main(argv=None):
    args = simple.parse_args(argv, "stacked", __doc__, add_stack_options)
    if args.verb != "train":
        simple.use_saved(args)
        return
    started_on = util.read_record(args.out, args.start).get("base") if args.start else None
    base = args.base or started_on or f"simple_{dataset_name(args.dataset)}"
    if base == args.name:
        raise util.ModelError(f"{base}: a stack would replace its own base; choose another --name")
    data = simple.load_training_data(args)
    models = {base: util.load_model(args.out, base, "autoencoder")}
    with util.training(__file__, args, data.checksums, "autoencoder"):
        encoder, decoder, models[args.name], rows, record = train(args, data, base)
        simple.write_run(args, models, encoder, decoder, data, rows, record)


if __name__ == "__main__":
    util.run_script(main)
