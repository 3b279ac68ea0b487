"""Compare nearest neighbours and clusters in pixel, PCA and feature space; needs a trained denoiser.

    python KNN.py                              # CIFAR-10, with simple_cifar10 and stacked_cifar10
    python KNN.py --dataset stl10              # with simple_stl10; clusters its 100,000 unlabelled images
    python KNN.py --dataset photos --encoders simple_photos

Every test image looks for its nearest training images in the space of pixels, of PCA-compressed pixels, and
of the feature maps of saved encoders, when it is clean, noisy and denoised; a linear support vector machine
is trained on the same spaces. Prints a table of accuracies and writes `figures/knn_DATASET_accuracy.png`,
`figures/knn_DATASET_neighbours.png`, `figures/knn_DATASET_clusters.png` (k-means on the feature maps), with
`models/kmeans_knn_DATASET_ENCODER_{centroids,labels}.npy`; `logs/knn_DATASET.json`; and feature maps for the
next time, 0.6 GB. CIFAR-10 takes 12 minutes on two CPU cores with AVX512-BF16. A fault is a `DataError` or
`ModelError`, both `OSError`, whose message is one line that names the file and the remedy.
"""

import argparse
import contextlib
import hashlib
from functools import partial

import util
from load_data import add_data_options, add_noise, check_labelled, dataset_name, evenly, fit_pca, load_data

import h5py
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import mode
from sklearn.cluster import KMeans
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NEIGHBOURS = (1, 3, 5, 10, 20, 50)  # what k is chosen from, on the validation split
METRIC = "euclidean"
POOLED_SIDE = 4
SVM_EPOCHS = 10
SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 3
SHOWN_CLUSTERS, SHOWN_OF_A_CLUSTER = 20, 10
CHUNK = 1000  # images compressed at a time


def pool(maps, side):
    """Average feature maps (N, h, w, c) over side x side cells; an axis that is shorter stays as it is."""
    for axis in (1, 2):
        length = maps.shape[axis]
        edges = np.linspace(0, length, min(side, length) + 1).round().astype(int)
        sums = np.add.reduceat(maps, edges[:-1], axis=axis)
        sizes = np.diff(edges).astype(maps.dtype)
        maps = sums / np.expand_dims(sizes, [other for other in range(4) if other != axis])
    return maps


def feature_maps(out, run, subset, images, labels, pooling=0, **described):
    """Feature maps of a saved encoder: read from their file, or made, where none was made from the same.

    Args:
        subset: Which images, for the name of the file, `feature_maps/RUN_SUBSET_COUNT_poolSIDE.h5`.
        images: Array (N, H, W, 3), uint8, or float32 nominally in [0, 1].
        pooling: Side of the grid that the maps are averaged to; 0 leaves them as they are.
        described: Further attributes for whoever reads the file: data set, split, sigma.

    Returns:
        float16 array (N, h, w, c).
    """
    path = out / f"feature_maps/{run}_{subset}_{len(images)}_pool{pooling}.h5"
    made_from = described | {
        "run": run,
        "weights": util.sha256_of(out / f"weights/encoder_{run}.weights.h5"),
        "images": hashlib.sha256(np.ascontiguousarray(images)).hexdigest(),
        "pooling": pooling,
    }
    features = read_feature_maps(path, made_from)
    if features is not None:
        return features
    encoder = util.load_model(out, run, "encoder")

    def encode(images):
        maps = util.encode(encoder, images)
        return pool(maps, pooling) if pooling else maps

    with util.atomic(path) as temporary:
        util.write_feature_maps(temporary, encode, images, labels, made_from)
    return read_feature_maps(path, made_from)


def read_feature_maps(path, made_from):
    """Feature maps of a file with these attributes; None where there is none, or a damaged one."""
    with contextlib.suppress(OSError, KeyError, RuntimeError, ValueError), h5py.File(path) as file:
        if dict(file.attrs) == made_from:
            return file["features"][()]
    return None


def flat(images):
    """Images (N, H, W, 3), uint8 or float32, as points (N, H * W * 3), float32 in [0, 1]."""
    return util.to_float(images).reshape(len(images), -1)


def compressed(images, pca):
    """Points (N, components), float32, that a fitted PCA makes of images (N, H, W, 3)."""
    points = np.empty((len(images), pca.n_components_), np.float32)
    for start in range(0, len(images), CHUNK):
        points[start : start + CHUNK] = pca.transform(flat(images[start : start + CHUNK]))
    return points


def spaces(args, data):
    """The spaces to compare, by label, each a function that turns images into points (N, d), float32.

    It takes images, labels, the name of this subset, which begins with its split, and the sigma of its noise.
    """
    pca = fit_pca(data.images["train"])

    def maps(run, images, labels, subset, sigma=0.0):
        described = {"dataset": data.name, "split": subset.partition("_")[0], "sigma": float(sigma)}
        features = feature_maps(args.out, run, subset, images, labels, args.pooling, **described)
        return features.reshape(len(features), -1).astype(np.float32)

    return {
        "pixels": lambda images, *_: flat(images),
        "PCA": lambda images, *_: compressed(images, pca),
    } | {run: partial(maps, run) for run in args.encoders}


def query_images(clean, sigmas, denoiser):
    """Queries by label, (sigma, images): clean ones, and for each sigma noisy (float32) and denoised ones."""
    queries = {"clean": (0.0, clean)}
    for sigma in sigmas:
        noisy = add_noise(clean, sigma)
        queries[f"noisy {sigma:g}"] = sigma, noisy
        queries[f"denoised {sigma:g}"] = sigma, util.denoise(denoiser, noisy)
    return queries


def vote(neighbour_labels):
    """The class that most of the k neighbours (N, k) have; of several, the one with the lowest number."""
    return mode(neighbour_labels, axis=1).mode


def choose_k(neighbour_labels, labels):
    """The k of NEIGHBOURS that classifies best, given labels (N, max k) sorted by distance, and true ones."""
    candidates = [k for k in NEIGHBOURS if k <= neighbour_labels.shape[1]]
    return max(candidates, key=lambda k: np.mean(vote(neighbour_labels[:, :k]) == labels))


def accuracies(predictions, labels):
    """Right predictions in percent, by kind of query."""
    return {kind: 100 * float(np.mean(predicted == labels)) for kind, predicted in predictions.items()}


def fit_svm(points, labels, seed):
    """Fit a linear support vector machine by stochastic gradient descent, in little memory.

    This and the `predict` of the pipeline that it returns standardize points (N, d), float32, in place.
    """
    scaler = StandardScaler(copy=False)
    for start in range(0, len(points), CHUNK):  # all at once, it would take a copy in float64
        scaler.partial_fit(points[start : start + CHUNK])
    svm = SGDClassifier(average=True, max_iter=SVM_EPOCHS, tol=None, random_state=seed, n_jobs=-1)
    return make_pipeline(scaler, svm.fit(scaler.transform(points), labels))


def compare(args, data, queries, space_of):
    """Accuracy of k nearest neighbours and of a linear SVM for every space and kind of query.

    Returns rows of the table, and the nearest training images, indices by space and kind of query.
    """
    labels, truth = data.labels["train"], data.labels["test"]
    rows, nearest = [], {}
    advance = util.progress(len(space_of) * (len(queries) + 1), "spaces and kinds of query")
    for space, transform in space_of.items():
        train = transform(data.images["train"], labels, "train")
        search = NearestNeighbors(n_neighbors=min(max(NEIGHBOURS), len(train)), metric=METRIC).fit(train)
        validation = data.images["validation"], data.labels["validation"]
        found = search.kneighbors(transform(*validation, "validation"), return_distance=False)
        k = choose_k(labels[found], validation[1])
        points, nearest[space] = {}, {}
        for kind, (sigma, images) in queries.items():
            subset = f"test_{kind.replace(' ', '_')}" if sigma else "test"
            points[kind] = transform(images, truth, subset, sigma)
            count = min(max(k, SHOWN_NEIGHBOURS), len(train))
            nearest[space][kind] = search.kneighbors(points[kind], count, return_distance=False)
            advance()
        votes = {kind: vote(labels[found[:, :k]]) for kind, found in nearest[space].items()}
        described = {"space": space, "dimensions": train.shape[1]}
        rows.append(described | {"method": f"{k}-NN"} | accuracies(votes, truth))
        svm = fit_svm(train, labels, args.seed)  # changes `train`, which is not needed any more
        predictions = {kind: svm.predict(tested) for kind, tested in points.items()}
        rows.append(described | {"method": "linear SVM"} | accuracies(predictions, truth))
        advance()
    return rows, nearest


def cluster(args, data, space, transform):
    """k-means of the denoisers' training images, and which images are nearest to each centroid (k, n)."""
    split = data.denoiser_split
    points = transform(data.images[split], data.labels[split], split)
    different = len({hash(point.tobytes()) for point in points})
    if different < args.clusters:
        print(f"{space}: {different} clusters, since only {different} of its {len(points):,} points differ")
    kmeans = KMeans(min(args.clusters, different), random_state=args.seed).fit(points)
    distances = kmeans.transform(points)
    return kmeans, np.argsort(distances, axis=0, kind="stable")[:SHOWN_OF_A_CLUSTER].T


def cluster_all(draft, args, data, space_of):
    """Cluster PCA-compressed pixels and each encoder's feature maps, of which the clusters are kept.

    Returns rows of the table, and the images nearest to each centroid by encoder.
    """
    labels = data.labels[data.denoiser_split]
    rows, gallery = [], {}
    for space in ("PCA", *args.encoders):
        kmeans, members = cluster(args, data, space, space_of[space])
        rows.append(cluster_row(space, labels, kmeans.labels_))
        if space in args.encoders:
            gallery[space] = members
            kept = f"kmeans_{args.name}_{space}"
            np.save(draft / f"models/{kept}_centroids.npy", kmeans.cluster_centers_)
            np.save(draft / f"models/{kept}_labels.npy", kmeans.labels_)
    return rows, gallery


def purity(labels, clusters):
    """Share of images that have the commonest label of their cluster (Manning et al. 2008, chapter 16.3)."""
    return contingency_matrix(labels, clusters).max(axis=0).sum() / len(labels)


def cluster_row(space, labels, clusters):
    """What the clusters have to do with the labels, a row of the table; labels of -1 are not known."""
    sizes = np.bincount(clusters)
    row = {"space": space, "images": len(labels), "smallest": int(sizes.min()), "largest": int(sizes.max())}
    if labels.min() < 0:
        return row | {"purity": "no labels", "adjusted Rand index": "no labels"}
    return row | {
        "purity": purity(labels, clusters),
        "adjusted Rand index": adjusted_rand_score(labels, clusters),
    }


def accuracy_figure(rows, kinds, title):
    """Accuracy in every space, bars for the kinds of query, a panel for each method."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    width = 0.8 / len(kinds)
    panels = {"k nearest neighbours": rows[::2], "linear SVM": rows[1::2]}
    for axis, (method, panel) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for index, kind in enumerate(kinds):
            places = np.arange(len(panel)) + (index - (len(kinds) - 1) / 2) * width
            axis.bar(places, [row[kind] for row in panel], width, label=kind)
        axis.set_xticks(
            range(len(panel)), [f"{row['space']}\n{row['dimensions']}" for row in panel], fontsize=8
        )
        axis.set_title(method, fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("accuracy in %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def neighbours_figure(data, queries, nearest):
    """Queries of the last sigma, and in each space the training images nearest to the noisy query."""
    noisy, denoised = list(queries)[-2:]
    shown = evenly(len(data.images["test"]), SHOWN_QUERIES)

    def names(labels):
        return [data.class_names[label] for label in labels]

    rows = [
        ("clean", data.images["test"][shown], names(data.labels["test"][shown])),
        (noisy, util.to_uint8(queries[noisy][1][shown]), None),
        (denoised, queries[denoised][1][shown], None),
    ]
    for space, found in nearest.items():
        for rank in range(min(SHOWN_NEIGHBOURS, found[noisy].shape[1])):
            index = found[noisy][shown, rank]
            images, captions = data.images["train"][index], names(data.labels["train"][index])
            rows.append((f"{space}\n{rank + 1}", images, captions))
    title = f"{data.name}: training images nearest to the query ({noisy}) in each space"
    return util.rows_figure(rows, title)


def clusters_figure(data, gallery):
    """For each space a block of rows: the images nearest to a centroid."""
    images, labels = data.images[data.denoiser_split], data.labels[data.denoiser_split]
    rows = []
    for space, members in gallery.items():
        for number, index in enumerate(members[:SHOWN_CLUSTERS]):
            captions = [data.class_names[label] for label in labels[index]] if labels.min() >= 0 else None
            rows.append((f"{space}\ncluster {number}", images[index], captions))
    return util.rows_figure(rows, f"{data.name}: the images nearest to each centroid", cell=1)


def parse_args(argv=None):
    description = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=util.HelpFormatter)
    add_data_options(parser)
    util.add_run_options(parser)
    add = parser.add_argument
    encoders = "saved runs whose feature maps are compared; without any, train one first"
    encoders += " (default: simple_DATASET and stacked_DATASET, those that are saved)"
    add("--encoders", type=util.run_name, nargs="+", metavar="NAME", help=encoders)
    denoiser = "run that denoises the queries (default: the last encoder)"
    add("--denoiser", type=util.run_name, metavar="NAME", help=denoiser)
    sigma = util.number(float, 1e-3, 255)
    add("--sigmas", type=sigma, nargs="+", default=(25, 50), help="noise of the queries")
    side = {"type": util.number(int, 0), "default": POOLED_SIDE, "metavar": "SIDE"}
    add("--pooling", **side, help="grid that feature maps are averaged to; 0: as they are")
    add("--clusters", type=util.number(int, 2), default=10, help="centroids of k-means")
    args = parser.parse_args(argv)
    args.name = args.name or f"knn_{dataset_name(args.dataset)}"
    return args


def main(argv=None):
    args = parse_args(argv)
    if "epochs" in util.read_record(args.out, args.name):
        raise util.ModelError(f"{args.name}: the name of a trained model; choose another --name")
    dataset = dataset_name(args.dataset)
    saved = util.denoiser_runs(args.out, dataset, "encoder")
    args.encoders = args.encoders or saved or [f"simple_{dataset}"]
    args.denoiser = args.denoiser or args.encoders[-1]
    denoiser = util.load_model(args.out, args.denoiser, "autoencoder")
    for run in args.encoders:  # a missing one is told before the work
        util.load_model(args.out, run, "encoder")
    data = load_data(args.dataset, args.data_dir, args.size, args.limit)
    count = len(data.images["test"])
    check_labelled(data, args.dataset)
    with util.publishing(args.out, args.name) as draft:
        space_of = spaces(args, data)
        queries = query_images(data.images["test"], args.sigmas, denoiser)
        rows, nearest = compare(args, data, queries, space_of)
        print(f"{data.name}: accuracy in % of {count:,} test images, denoised by {args.denoiser};")
        searched = f"{len(data.images['train']):,} training images"
        print(f"neighbours among {searched}, {METRIC}, k chosen on the validation split:")
        print(util.format_table(rows))
        print(f"95 % intervals: at most {98 / np.sqrt(count):.1f} points either side")
        cluster_rows, gallery = cluster_all(draft, args, data, space_of)
        print(util.format_table(cluster_rows))
        figures = {
            "accuracy": accuracy_figure(rows, list(queries), f"{data.name}, {count:,} test images"),
            "neighbours": neighbours_figure(data, queries, nearest),
            "clusters": clusters_figure(data, gallery),
        }
        util.save_figures(draft, args.name, figures)
        origin = {"arguments": util.recorded_arguments(args), "environment": util.environment()}
        results = {"test_images": count, "accuracy": rows, "clusters": cluster_rows}
        util.write_record(draft, args.name, origin | {"data": data.identity} | results)
    print(f"Written to {args.out}: figures, clusters, record of {args.name}, and feature maps")


if __name__ == "__main__":
    util.run_script(main)
