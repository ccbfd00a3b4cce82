"""VQAv2 of `vlm data convert`: what comes out, and every fault."""

from __future__ import annotations

import pytest
from source_files import bytes_of, encoded, vqa

from vlm.data_tools.sources import open_source
from vlm.errors import UsageError

VQA_NAMES = {
    "official": ("COCO_val2014_{:012d}.jpg", "val2014"),
    "in the folder of the split": ("val2014/COCO_val2014_{:012d}.jpg", "val2014"),
    "COCO 2017": ("{:012d}.jpg", "val2014"),
    "plain": ("{}.jpg", None),
}


@pytest.mark.parametrize("naming", VQA_NAMES)
def test_vqa_keeps_all_answers_and_finds_the_pictures(naming, read, write, tmp_path):
    pattern, part = VQA_NAMES[naming]
    for number in range(4):
        write(f"images/{pattern.format(number)}", encoded(number))
    questions, annotations = vqa(4, data_subtype=part)
    paths = {"annotations": write("a.json", annotations)}
    records, skipped = read("vqa", write("q.json", questions), tmp_path / "images", **paths)
    assert not skipped and [bytes_of(record) for record in records] == [[encoded(number)] for number in range(4)]
    for number, record in enumerate(records):
        assert record.fields["image_id"] == number and record.fields["image"] == pattern.format(number)
        assert record.fields["qa"] == [
            {
                "question": f"Question {n} of {number}?",
                "answers": [f"answer {a}" for a in range(10)],
                "question_id": 1000 * number + n,
                "type": "other",
                "question_type": "what is",
            }
            for n in range(3)
        ]


def test_vqa_images_keep_the_order_of_their_first_question(read, write, pictures):
    questions, annotations = vqa(3)
    questions["questions"].sort(key=lambda question: (question["question_id"] % 1000, -question["image_id"]))
    paths = {"annotations": write("a.json", annotations)}
    records, _ = read("vqa", write("q.json", questions), pictures, **paths)
    assert [record.fields["image_id"] for record in records] == [2, 1, 0]
    assert [entry["question_id"] for entry in records[0].fields["qa"]] == [2000, 2001, 2002]


def test_vqa_skips_and_names_what_does_not_fit(read, write, pictures):
    questions, annotations = vqa(3)
    answered = {entry["question_id"]: entry for entry in annotations["annotations"]}
    answered.pop(1)
    answered[1001]["image_id"] = 2
    answered[2000]["answers"][3]["answer"] = ""
    answered[2001]["answers"] = []
    answered[9000] = {"question_id": 9000, "image_id": 0, "answers": []}
    annotations["annotations"] = [*answered.values(), answered[0], {"answers": []}]
    questions["questions"] += [{"image_id": 7, "question": "Where?", "question_id": 7000}, questions["questions"][0]]
    answered[7000] = answered[0] | {"question_id": 7000, "image_id": 7}
    annotations["annotations"].append(answered[7000])
    paths = {"annotations": write("a.json", annotations)}
    records, skipped = read("vqa", write("q.json", questions), pictures, **paths)
    asked = [[entry["question_id"] for entry in record.fields["qa"]] for record in records]
    assert asked == [[0, 2], [1000, 1002], [2002]]
    reasons = [one.reason.replace(f"{pictures.parent}/", "") for one in skipped]
    assert reasons == [
        "q.json question 1: no answers in a.json; give the annotations that belong",
        "q.json question 1001: asked about image 1, answered about 2; give the annotations that belong",
        "a.json question 2000: 9 answers of 10 have a text; fill in the others",
        "a.json question 2001: 0 answers of 0 have a text; fill in the others",
        "q.json image 7: none of COCO_val2014_000000000007.jpg, val2014/COCO_val2014_000000000007.jpg, 000000000007.jpg, "
        "7.jpg in pictures; give their folder by --images",
        "a.json question 9000: not in q.json; give the questions that belong",
        "q.json 11 of questions: question_id 0 comes twice; give every question its own",
        "a.json 10 of annotations: question_id 0 comes twice; give every question its own",
        'a.json 11 of annotations: no "question_id" or no "image_id"; give both',
    ]


def test_vqa_files_that_can_not_be_used(read, write, pictures):
    questions, annotations = (write(name, told) for name, told in zip(("q.json", "a.json"), vqa(2), strict=True))
    for arguments, message in (
        ({}, "q.json: questions without answers; give --annotations v2_…_annotations.json"),
        ({"annotations": pictures / "no.json"}, "no.json: no such file; check the path"),
        ({"annotations": questions}, 'q.json: no "annotations" in it; give v2_…_annotations.json'),
        ({"src": annotations, "annotations": annotations}, 'a.json: no "questions" in it; give v2_…_questions.json'),
    ):
        with pytest.raises(UsageError) as refusal:
            read("vqa", **{"src": questions, "images": pictures} | arguments)
        assert message in str(refusal.value)


def test_vqa_annotations_that_have_changed_are_another_source(write, pictures):
    questions, told = vqa(2)
    src, path = write("q.json", questions), write("a.json", told)
    one = vars(open_source("vqa", src, pictures, annotations=path))
    write("a.json", told | {"more": 1})
    assert vars(open_source("vqa", src, pictures, annotations=path)) != one
