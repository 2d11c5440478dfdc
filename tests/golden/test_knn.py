"""Search and metrics against the original implementation's neighbours: golden/knn.npz, cases read from the file."""

import re

import numpy as np
import pytest
import torch

from udonlib.evaluation.metrics import count_positives, mmp_at_k, r_at_k, relevance
from udonlib.evaluation.search import nearest


@pytest.fixture(scope="module")
def knn(golden):
    return golden("knn")


def column(labels):
    return torch.from_numpy(np.asarray(labels, dtype=np.int64)).reshape(len(labels), -1)


def same_domain(labels):
    return torch.zeros(len(labels), dtype=torch.int64)


def check(knn, case, k, queries, query_labels, query_domains, index, index_labels, index_domains, itself=None):
    """Search with the case's k, and compare everything that the file holds under `case`."""
    query_labels, index_labels = column(query_labels), column(index_labels)
    of_both = (query_labels, query_domains, index_labels, index_domains)
    _, positions = nearest(torch.from_numpy(queries), torch.from_numpy(index), k, itself)
    hit = relevance(positions, *of_both)
    n_positives = count_positives(*of_both, itself)
    recall, precision = r_at_k(hit), mmp_at_k(hit, n_positives, k)
    if f"{case}/neighbours" in knn:
        assert positions.tolist() == knn[f"{case}/neighbours"].tolist()
        assert n_positives.tolist() == knn[f"{case}/n_positives"].tolist()
        assert recall.tolist() == knn[f"{case}/r1"].tolist()
        assert recall.double().mean().item() == pytest.approx(knn[f"{case}/mean_r1__f64"].item(), abs=1e-12)
        assert round(recall.double().mean().item(), 3) == pytest.approx(knn[f"{case}/ref_rounded_r1"].item(), abs=1e-6)
        mean = precision.double().mean().item()
        assert round(mean, 3) == pytest.approx(knn[f"{case}/ref_rounded_mmp"].item(), abs=1e-6)
    np.testing.assert_allclose(precision.numpy(), knn[f"{case}/mmp"], rtol=0, atol=1e-6)
    assert precision.double().mean().item() == pytest.approx(knn[f"{case}/mean_mmp__f64"].item(), abs=1e-6)


def test_queries_that_are_the_index_find_the_same_neighbours(knn):
    embeddings, labels = knn["a/embeddings"], knn["a/labels"]
    domains, itself = same_domain(labels), torch.arange(len(labels))
    check(knn, "a", int(knn["a/k"]), embeddings, labels, domains, embeddings, labels, domains, itself)


def test_every_other_k_of_the_file_gives_the_same_precision(knn):
    embeddings, labels = knn["a/embeddings"], knn["a/labels"]
    domains, itself = same_domain(labels), torch.arange(len(labels))
    cases = {
        match[0].removesuffix("/mmp"): int(match[1])
        for match in map(re.compile(r"a/k(\d+)/mmp").fullmatch, knn)
        if match
    }
    assert cases
    for case, k in cases.items():
        check(knn, case, k, embeddings, labels, domains, embeddings, labels, domains, itself)


@pytest.mark.parametrize("case", ["b", "d"])
def test_queries_apart_from_the_index_find_the_same_neighbours_with_one_label_or_several(knn, case):
    labels = knn["b/query_labels"] if case == "b" else knn["d/query_label_lists_padded_with_-1"]
    index_labels = knn["b/index_labels"]
    queries, index = knn["b/query_embeddings"], knn["b/index_embeddings"]
    k = int(knn["b/k"])
    check(knn, case, k, queries, labels, same_domain(labels), index, index_labels, same_domain(index_labels))


def test_queries_of_each_domain_find_the_same_neighbours_in_the_merged_index(knn):
    index, index_labels = knn["c/index_embeddings"], knn["c/index_labels"]
    index_domains = torch.from_numpy(knn["c/index_domains"].astype(np.int64))
    found = {match[1] for match in map(re.compile(r"c/self_domain(\d+)/.*").fullmatch, knn) if match}
    assert found
    for domain in map(int, found):
        own = (index_domains == domain).nonzero()[:, 0]
        case, rows = f"c/self_domain{domain}", own.numpy()
        of_queries = (index[rows], index_labels[rows], index_domains[own])
        check(knn, case, int(knn["c/k"]), *of_queries, index, index_labels, index_domains, own)


def test_separate_queries_of_one_domain_find_the_same_neighbours_in_the_merged_index(knn):
    labels = knn["c/sep/query_labels"]
    domains = torch.full((len(labels),), int(knn["c/sep/query_domain"]))
    index_domains = torch.from_numpy(knn["c/index_domains"].astype(np.int64))
    index = (knn["c/index_embeddings"], knn["c/index_labels"], index_domains)
    check(knn, "c/sep", int(knn["c/k"]), knn["c/sep/query_embeddings"], labels, domains, *index)
