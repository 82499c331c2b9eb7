"""The same word, three tasks, three answers, in one batch; then one ordinary LoRA for each task.

    python examples/word_tasks.py                  # SmolLM2-135M; 1.5 minutes on two CPU cores
    python examples/word_tasks.py --model NAME     # any causal LM, by name or folder

The prompts do not say which task is meant: a row's task id does. The shared LoRA learns the form of
an answer, each task's own LoRA what to answer.
"""

import argparse

import torch
from transformers import DataCollatorWithFlattening, TrainingArguments

import ckf
from ckf.backbone import load_backbone, pick_device
from ckf.config import ModelConfig

PROMPT = "Word: {}\nAnswer:"  # says nothing of the task
TASKS = ("more", "most", "noun")
WORDS = {
    "big": ("bigger", "biggest", "bigness"),
    "bold": ("bolder", "boldest", "boldness"),
    "bright": ("brighter", "brightest", "brightness"),
    "calm": ("calmer", "calmest", "calmness"),
    "clean": ("cleaner", "cleanest", "cleanness"),
    "cold": ("colder", "coldest", "coldness"),
    "dark": ("darker", "darkest", "darkness"),
    "dry": ("drier", "driest", "dryness"),
    "empty": ("emptier", "emptiest", "emptiness"),
    "fair": ("fairer", "fairest", "fairness"),
    "fresh": ("fresher", "freshest", "freshness"),
    "good": ("better", "best", "goodness"),
    "great": ("greater", "greatest", "greatness"),
    "happy": ("happier", "happiest", "happiness"),
    "hard": ("harder", "hardest", "hardness"),
    "heavy": ("heavier", "heaviest", "heaviness"),
    "loud": ("louder", "loudest", "loudness"),
    "mild": ("milder", "mildest", "mildness"),
    "near": ("nearer", "nearest", "nearness"),
    "neat": ("neater", "neatest", "neatness"),
    "quick": ("quicker", "quickest", "quickness"),
    "rough": ("rougher", "roughest", "roughness"),
    "sad": ("sadder", "saddest", "sadness"),
    "sharp": ("sharper", "sharpest", "sharpness"),
    "sick": ("sicker", "sickest", "sickness"),
    "sweet": ("sweeter", "sweetest", "sweetness"),
}
NEW_WORDS = ("kind", "lazy", "soft", "weak")  # of which training sees nothing


def train_rows(tokenizer) -> list[dict]:
    """One row a word and task: token ids, labels on the answer alone, the task's name."""
    rows = []
    for word, answers in WORDS.items():
        prompt = tokenizer(PROMPT.format(word)).input_ids
        for task, answer in zip(TASKS, answers, strict=True):
            labels = tokenizer(f" {answer}\n", add_special_tokens=False).input_ids
            hidden = [-100] * len(prompt)
            rows.append({"input_ids": prompt + labels, "labels": hidden + labels, "task_ids": task})
    return rows


def answers(model, tokenizer, words, task_ids: list) -> list[str]:
    """The model's answer to every word under every id, all of them one batch."""
    prompts = [PROMPT.format(word) for word in words for _ in task_ids]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    batch = batch.to(model.device)
    written = model.generate(
        **batch,
        task_ids=task_ids * len(words),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(
        written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip().split("\n")[0] for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="runs/word-tasks")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_backbone(ModelConfig(name=args.model), pick_device())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = ckf.patch_model(model, tasks=list(TASKS), r=8)
    model.set_attn_implementation("ckf_packed")  # rows of a packed batch attend within themselves

    trainer = ckf.MultiLoRATrainer(
        model=model,
        args=TrainingArguments(
            args.out,
            max_steps=args.steps,
            per_device_train_batch_size=26,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=model.device.type == "cpu",
        ),
        train_dataset=train_rows(tokenizer),
        data_collator=ckf.TaskCollator(model, DataCollatorWithFlattening()),
    )
    trainer.train()

    model.eval()
    ids = [-1, *TASKS]  # -1: the base model alone
    found = iter(answers(model, tokenizer, NEW_WORDS, ids))
    print("\n" + "".join(f"{name:<16}" for name in ("new word", "base alone", *TASKS)))
    for word in NEW_WORDS:
        print(f"{word:<16}" + "".join(f"{next(found)[:14]:<16}" for _ in ids))

    ckf.save_adapters(model, f"{args.out}/adapters")  # ckf.load_patched reads them
    for task in TASKS:
        ckf.export_peft(model, task, f"{args.out}/{task}")  # for PEFT, vLLM, SGLang, ...
    print(f"\nadapters: {args.out}/adapters; ordinary LoRAs: {args.out}/" + "|".join(TASKS))


if __name__ == "__main__":
    main()
