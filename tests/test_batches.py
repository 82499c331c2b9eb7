"""Rows of the data to questions and tensors: vectors, places, packing, draws."""

import numpy as np
import pytest
import torch

from ckf.batches import Collator, Example, VectorLookup, is_drawn, stars
from ckf.cf import fold_in_users
from ckf.prompts import ANSWERS, USER_SLOT, Encoded
from tests.ckf_fixtures import TASKS

PROMPTS = [
    Encoded("topk", [11, 12, 0, 13, 0], [(2, USER_SLOT), (4, 3)], [14]),
    Encoded("explain", [21, 0], [(1, USER_SLOT)], [22, 23, 24]),
    Encoded("topk", [31, 32, 33], [], []),
]
USERS = np.array([1, 0, 2])
HISTORIES = np.array([[-1, -1, 5], [2, 3, 4], [-1, -1, -1]])


@pytest.fixture(scope="module")
def lookup(small_run):
    return VectorLookup(small_run.assembly.vectors)


def collate(lookup, packed):
    return Collator(["ctr", "topk", "explain"], lookup, 7, packed)(PROMPTS, USERS, HISTORIES)


def test_packed_rows_lie_in_one_sequence(lookup):
    batch = collate(lookup, packed=True)
    ids = [11, 12, 0, 13, 0, 14, 21, 0, 22, 23, 24, 31, 32, 33]
    assert batch["input_ids"].tolist() == [ids]
    assert batch["position_ids"].tolist() == [[*range(6), *range(5), *range(3)]]
    assert batch["task_ids"].tolist() == [[1] * 6 + [2] * 5 + [1] * 3]
    assert batch["slots"].tolist() == [2, 4, 7]
    assert batch["slot_rows"].tolist() == [0, -1, 1]
    assert batch["label_slots"].tolist() == [4, 7, 8, 9]
    assert batch["last_slots"].tolist() == [4, 7, 13]
    assert "attention_mask" not in batch and "first_column" not in batch


def test_padded_rows_end_together(lookup):
    batch = collate(lookup, packed=False)
    assert batch["input_ids"].tolist() == [
        [11, 12, 0, 13, 0, 14],
        [7, 21, 0, 22, 23, 24],
        [7, 7, 7, 31, 32, 33],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 6, [0] + [1] * 5, [0] * 3 + [1] * 3]
    assert batch["position_ids"].tolist()[1:] == [[0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 1, 2]]
    assert batch["task_ids"].tolist() == [[1] * 6, [2] * 6, [1] * 6]
    assert batch["slots"].tolist() == [2, 4, 8]
    assert batch["label_slots"].tolist() == [4, 8, 9, 10]
    assert batch["last_slots"].tolist() == [4, 8, 17]
    predicting = [*batch["label_slots"].tolist(), *batch["last_slots"].tolist()]
    assert batch["first_column"] == min(p % 6 for p in predicting)


@pytest.mark.parametrize("packed", [True, False])
def test_labels_are_what_follows_their_position(lookup, packed):
    batch = collate(lookup, packed)
    ids = batch["input_ids"].flatten()
    assert torch.equal(ids[batch["label_slots"] + 1], batch["label_tokens"])
    assert batch["label_tokens"].tolist() == [14, 22, 23, 24]
    assert batch["label_rows"].tolist() == [0, 1, 1, 1]
    assert batch["row_tasks"].tolist() == [1, 2, 1]


@pytest.mark.parametrize("packed", [True, False])
def test_vectors_come_from_their_row(lookup, packed):
    batch = collate(lookup, packed)
    table = lookup.vectors
    assert torch.equal(batch["user_vectors"], table.users[USERS])
    assert torch.equal(batch["item_vectors"], table.items[[3]])
    assert torch.equal(batch["history_vectors"][1], table.items[[2, 3, 4]])
    assert batch["history_mask"].tolist() == (HISTORIES >= 0).tolist()
    assert (batch["history_vectors"][~batch["history_mask"]] == 0).all()
    assert "user_vectors" not in collate(None, packed)


def test_known_users_have_their_own_vector_and_strangers_that_of_their_history(lookup):
    history = np.array([[-1, 4, 6], [-1, 4, 6], [-1, -1, -1]])
    vectors = lookup.users(np.array([2, -1, -1]), history)
    assert torch.equal(vectors[0], lookup.vectors.users[2])
    assert torch.equal(vectors[1], fold_in_users(lookup.vectors, history)[1])
    assert not torch.equal(vectors[1], vectors[0]) and vectors[1].abs().max() > 0
    assert (vectors[2] == 0).all()


def test_looked_up_vectors_are_standardised(lookup):
    known = lookup.vectors.items[lookup.vectors.item_known]
    torch.testing.assert_close(known.mean(0), torch.zeros(lookup.dim), atol=1e-5, rtol=0)
    torch.testing.assert_close(known.std(0, correction=0), torch.ones(lookup.dim))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_say_what_the_data_say(small_run, task, split):
    maker, data = small_run.assembly.maker, small_run.assembly.data
    examples = maker.examples(task, split)
    assert [e.row for e in examples] == data.rows(task, split).tolist()
    for example in examples:
        question, row = maker.question(example, split), example.row
        assert question.history == [i for i in data.history[row] if i >= 0]
        assert question.item == data.item[row]
        if task == "ctr":
            assert question.answer == ("Yes" if data.rating[row] >= 4 else "No")
        elif task == "topk":
            chosen = question.candidates[ANSWERS["topk"].index(question.answer)]
            assert chosen == data.item[row] and len(set(question.candidates)) == 10
        elif task == "explain":
            assert question.answer and question.answer in data.text(row)
            assert question.review == ""
        else:
            assert question.answer == str(int(data.rating[row]))
            assert question.review == (data.text(row) if task == "review_rating" else "")
        assert maker.question(example, split, answered=False).answer is None


def test_stars_are_whole_and_keep_the_mean():
    rows = np.arange(10_000)
    for rating in (1, 1.4, 2.5, 4.49, 4.5, 5):
        found = stars(np.full(len(rows), rating), rows)
        assert set(found) <= {int(rating), int(rating) + 1}
        assert found.mean() == pytest.approx(rating, abs=1e-3)
    assert stars([0.5, 5.4, 4], [3, 2, 2**40]).tolist() == [1, 5, 4]
    assert stars(np.float32(3.0), 7) == 3


def test_draws_depend_on_seed_and_position_alone():
    draws = [is_drawn(3, p, 0.5) for p in range(200)]
    assert draws == [is_drawn(3, p, 0.5) for p in range(200)]
    assert draws != [is_drawn(4, p, 0.5) for p in range(200)]
    assert [is_drawn(3, p, 0.5) for p in reversed(range(200))] == draws[::-1]
    shares = [np.mean([is_drawn(0, p, s) for p in range(4000)]) for s in (0, 0.2, 0.7, 1)]
    assert shares[0] == 0 and shares[3] == 1
    assert abs(shares[1] - 0.2) < 0.03 and abs(shares[2] - 0.7) < 0.03


def test_a_row_drawn_as_text_stays_text_at_a_higher_share():
    assert all(is_drawn(0, p, 0.8) for p in range(300) if is_drawn(0, p, 0.4))


def test_a_batch_of_examples_takes_users_and_histories_of_their_rows(small_run):
    parts = small_run.assembly
    examples = [Example("ctr", int(r)) for r in parts.data.rows("ctr", "test")[:3]]
    prompts = [parts.batcher.encode(e, "test", vectors=True) for e in examples]
    batch = parts.batcher.batch(examples, prompts)
    rows = [e.row for e in examples]
    table = VectorLookup(parts.vectors).vectors
    assert torch.equal(batch["user_vectors"], table.users[parts.data.user[rows]])
    assert batch["history_mask"].tolist() == (parts.data.history[rows] >= 0).tolist()
