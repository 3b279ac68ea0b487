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
starts at the simple model's PSNR. Writes the same files as `simple_autoencoder.py`, under the name
`stacked_DATASET`. A training of CIFAR-10 with the defaults takes an hour on two CPU cores with AVX512-BF16.
"""

import simple_autoencoder as simple
import util
from load_data import dataset_name, load_data

import keras
from keras import layers

# architecture of level two: with level one 209 million multiply-accumulates for a 32x32 image
FILTERS = 128
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3
LATENT_DIM = 128

# optimization
GREEDY_EPOCHS = 1
EPOCHS = 8  # of the joint tuning
LEARNING_RATE = 5e-4  # at 1e-3 the loss of Adam became infinite in the second epoch
KL_WEIGHT = 1e-4  # with 1e-3, 0.3 dB less at sigma 75


def load_level_one(out, name):
    """Load encoder and decoder of a trained simple model, in the precision that is set for training.

    Raises:
        util.ModelError: they are missing, damaged or not those of a simple model.
    """
    models = []
    for part, build in (("encoder", simple.build_encoder), ("decoder", simple.build_decoder)):
        saved = util.load_model(out, name, part)
        blocks = sum(isinstance(layer, layers.Add) for layer in saved.layers)
        try:
            first = saved.get_layer("to_cells" if part == "encoder" else "from_code")
            latent_dim = saved.get_layer("z_mean").filters if part == "encoder" else saved.inputs[0].shape[-1]
            model = build(first.filters, blocks, latent_dim)
            model.set_weights(saved.get_weights())
        except ValueError:
            path = out / "models" / f"{part}_{name}.json"
            raise util.ModelError(
                f"{path}: not the {part} of a simple model; choose another --base"
            ) from None
        models.append(model)
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
    return keras.Model(noisy, [z_mean, z_log_var, *simple.code_heads(x, latent_dim, "z2")], name="encoder")


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
    return keras.Model([z, z2], level_one(layers.Add(name="ladder")([z, fine])), name="decoder")


def autoencoder_of(vae):
    """The saved form of what `vae` has learnt: float32, deterministic."""
    return util.portable_copy(simple.build_autoencoder(vae.encoder, vae.decoder))


def validation_psnr(model, data, args):
    """Mean PSNR of an autoencoder on the noisy validation images, in dB."""
    clean = data.images["validation"]
    return float(util.psnr(clean, util.denoise(model, simple.validation_noise(clean, args.sigma))).mean())


def add_stack_options(parser):
    """Add the options that `simple_autoencoder.py` does not have, and the defaults that differ."""
    parser.add_argument(
        "--base", type=util.run_name, help="simple model to stack on (default: simple_DATASET)"
    )
    parser.add_argument(
        "--greedy-epochs", type=util.number(int, 1), default=GREEDY_EPOCHS, help="with level one frozen"
    )
    parser.set_defaults(
        filters=FILTERS,
        latent_dim=LATENT_DIM,
        epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        kl_weight=KL_WEIGHT,
    )


def train(args, data, base):
    """Train greedily, then jointly, telling the validation PSNR of each stage.

    Returns:
        Trained `simple.DenoisingVAE`, metrics of all epochs, and what the run record tells of the stages.
    """
    level_one = load_level_one(args.out, base)
    encoder = stack_encoder(level_one[0], args.filters, ENCODER_BLOCKS, args.latent_dim)
    decoder = stack_decoder(level_one[1], args.filters, DECODER_BLOCKS, args.latent_dim)
    vae = simple.build_vae(encoder, decoder, args)
    stages = {"simple": validation_psnr(autoencoder_of(vae), data, args)}
    print(f"Validation PSNR of {base}, before stacking: {stages['simple']:.2f} dB", flush=True)
    plan = [("greedy", args.greedy_epochs, True), ("joint", args.epochs, False)]
    if args.start:  # both levels are there already
        util.start_from(encoder, args.out, args.start, "encoder")
        util.start_from(decoder, args.out, args.start, "decoder")
        stages["start"] = validation_psnr(autoencoder_of(vae), data, args)
        print(f"Validation PSNR of {args.start}: {stages['start']:.2f} dB", flush=True)
        del plan[0]
    rows, weights = [], {}
    for stage, epochs, frozen in plan:
        for model in level_one:
            model.trainable = not frozen
        before = len(rows)
        for row in simple.fit_denoiser(vae, data, args, epochs, stage, before):
            rows.append({"stage": stage} | row | {"epoch": before + row["epoch"]})
        weights[stage] = vae.get_weights()
        stages[stage] = validation_psnr(autoencoder_of(vae), data, args)
        print(f"Validation PSNR after the {stage} stage: {stages[stage]:.2f} dB", flush=True)
    kept = max(reversed(weights), key=stages.get)
    if kept == "greedy":
        print("The joint stage has not gained: the weights of the greedy stage are kept.")
        vae.set_weights(weights["greedy"])
    best = util.best_row([row for row in rows if row["stage"] == kept], "val_psnr")
    return vae, rows, {"base": base, "validation_psnr": stages, "best": best}


def main(argv=None):
    args = simple.parse_args(argv, "stacked", __doc__, add_stack_options)
    if args.verb == "denoise":
        simple.denoise_pictures(args)
        return
    if args.verb == "evaluate":
        base = util.read_record(args.out, args.name).get("base")
        simple.evaluate_saved(args, ({"simple": base} if base else {}) | {"stacked": args.name})
        return
    started_on = util.read_record(args.out, args.start).get("base") if args.start else None
    base = args.base or started_on or f"simple_{dataset_name(args.dataset)}"
    data = load_data(args.dataset, args.data_dir, args.size, args.limit)
    models = {"simple": util.load_model(args.out, base, "autoencoder")}
    with util.training(__file__, args):
        vae, rows, record = train(args, data, base)
        models["stacked"] = autoencoder_of(vae)
        simple.write_run(args, models, vae, data, rows, record)


if __name__ == "__main__":
    util.run_script(main)
