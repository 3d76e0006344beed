"""What the generative judge promises: P(Yes) where the answer begins, in both orders, with gradients, as a reward."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import binary_dilation
from tiny_judge import CHAT, SIZE, tiny_judge, tiny_parts, tiny_tokenizer
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from onereward.rewards.judge import (  # noqa: E402
    QUESTION,
    GenerativeJudge,
    both_orders,
    draw_outline,
    load_processor,
    preprocess,
    win_rates,
)
from onereward.rewards.scoring import RewardScorer  # noqa: E402


def random_images(count, channels=1, size=SIZE, seed=0):
    """Of 8 bits, so that a picture made of them is the same image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator) / 255


def smooth_images(count, size, seed=0):
    """Waves without sharp edges, away from black and white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = [0.5 + 0.3 * np.sin(a * x + b * y + c) for a, b, c in rng.uniform(0, 4, (count, 3))]
    return (torch.tensor(np.stack(waves)[:, None]) * 255).round().float() / 255


@pytest.fixture(scope="module")
def judge():
    return tiny_judge()


# ------------------------------------------------------------------------------------------------------ the answer


def test_the_reward_is_yes_against_no_at_the_first_generated_token(judge):
    a, b = random_images(1), random_images(1, seed=1)
    inputs = judge.prepare_inputs(a, b, criterion="realism")
    generated = judge.model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    whole = generated.logits[0].softmax(dim=1)[0]
    vocabulary = judge.processor.tokenizer.get_vocab()
    yes, no = whole[vocabulary["Yes"]], whole[vocabulary["No"]]
    ours = judge.compare(a, b, criterion="realism", average_orders=False)
    torch.testing.assert_close(ours, (yes / (yes + no))[None])


def test_pairs_of_a_batch_do_not_touch_each_other():
    judge = tiny_judge(prompt_criteria=["text_alignment", "realism"])
    a, b = random_images(3), random_images(3, seed=1)
    prompts = ["a long prompt that takes many tokens, and some more", "", "short"]
    tasks, criteria = ["fill", "remove", "extend"], ["realism", "text_alignment", "quality"]
    together = judge.compare(a, b, prompts=prompts, tasks=tasks, criterion=criteria)
    for i in range(3):
        alone = judge.compare(a[[i]], b[[i]], None, None, [prompts[i]], [tasks[i]], criteria[i])
        torch.testing.assert_close(together[[i]], alone, atol=1e-6, rtol=0)
    assert together.unique().numel() == 3


def test_batches_of_any_size_give_the_same(judge):
    a, b = random_images(5), random_images(5, seed=1)
    whole = judge.compare(a, b)
    torch.testing.assert_close(tiny_judge(batch_size=2).compare(a, b), whole, atol=1e-6, rtol=0)


def test_the_order_of_the_images_does_not_matter_on_average(judge):
    a, b = random_images(4), random_images(4, seed=1)
    p_ab, gap_ab = judge.compare(a, b, return_gap=True)
    p_ba, gap_ba = judge.compare(b, a, return_gap=True)
    torch.testing.assert_close(p_ab + p_ba, torch.ones(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(gap_ab, gap_ba, atol=1e-6, rtol=0)
    torch.testing.assert_close(judge.compare(a, a), torch.full((4,), 0.5))
    once, swapped = (judge.compare(*pair, average_orders=False) for pair in ((a, b), (b, a)))
    torch.testing.assert_close(gap_ab, (once + swapped - 1).abs(), atol=1e-6, rtol=0)


def test_a_judge_of_positions_has_the_full_gap_and_no_opinion():
    always_yes = torch.tensor([50.0])
    p, gap = both_orders(always_yes, always_yes)
    assert p.item() == 0.5 and gap.item() == 1


def test_comparing_is_without_dropout_and_leaves_the_training_mode_alone():
    judge = tiny_judge()
    adapter = LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    judge.model = get_peft_model(judge.model, adapter).train()
    first, again = (judge.compare(random_images(2), random_images(2, seed=1)) for _ in range(2))
    assert torch.equal(first, again) and not first.requires_grad
    assert judge.model.training


# ---------------------------------------------------------------------------------------------------- the question


def test_the_prompt_is_quoted_for_text_alignment_alone(judge):
    text = judge.ask("remove", "text_alignment", "healthy {tissue}")
    assert "Task: object removal. Evaluation dimension: text alignment. Prompt: healthy {tissue}. Is the first" in text
    assert "Prompt" not in judge.ask("remove", "clinical_relevance", "healthy tissue")
    assert "Prompt" not in judge.ask("remove", "text_alignment", "")


def test_the_wording_can_be_chosen():
    judge = tiny_judge(
        question="{first}{second}{criterion} in {task}?", wording={"realism": "like a scan", "fill": "x"}
    )
    assert "like a scan in x?" in judge.ask("fill", "realism")


@pytest.mark.parametrize(
    "question", ["{first} or {first}?", "{second} or {first}?", "{first}?", "{first}{second}{colour}"]
)
def test_a_question_that_cannot_be_asked_is_refused(question):
    with pytest.raises(ValueError, match="`question` is .* expected"):
        tiny_judge(question=question)


def test_mask_and_source_can_be_shown_as_pictures():
    a, b = random_images(2), random_images(2, seed=1)
    source, mask = random_images(2, seed=2), torch.zeros(2, 1, SIZE, SIZE)
    mask[:, :, 4:12, 4:8] = 1
    plain = tiny_judge().prepare_inputs(a, b, mask, source)
    judge = tiny_judge(question="Mask: {mask} source: {source}. " + QUESTION)
    inputs = judge.prepare_inputs(a, b, mask, source)
    assert len(plain["image_grid_thw"]) == 4 and len(inputs["image_grid_thw"]) == 8
    own = judge.processor.image_processor
    for place, shown in enumerate((mask, source, a, b)):
        picture = Image.fromarray((255 * shown[1, 0]).round().byte().numpy()).convert("RGB")
        expected = own([picture], return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs["pixel_values"].unflatten(0, (8, -1))[4 + place], expected)
    for given, missing in (((mask, None), "sources"), ((None, source), "masks")):
        with pytest.raises(ValueError, match=f"`{missing}` is None, but the question shows them"):
            judge.compare(a, b, *given)


def test_the_outline_surrounds_the_mask_and_hides_none_of_it():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[3:9, 5:12] = True
    mask[8, 13] = mask[0, 0] = True
    image = random_images(1, channels=3)[0]
    drawn = draw_outline(image, torch.tensor(mask)[None].float())
    line = binary_dilation(mask, np.ones((3, 3))) & ~mask
    assert torch.equal(drawn[:, ~torch.tensor(line)], image[:, ~torch.tensor(line)])
    assert (drawn[:, torch.tensor(line)] == torch.tensor([1.0, 0, 0])[:, None]).all()

    judge = tiny_judge(outline=True)
    a, b = random_images(1), random_images(1, seed=1)
    masks = torch.tensor(mask)[None, None].float()
    by_hand = [draw_outline(side[0].expand(3, -1, -1), masks[0])[None] for side in (a, b)]
    torch.testing.assert_close(judge.compare(a, b, masks), tiny_judge().compare(*by_hand))


def test_an_answer_of_several_tokens_is_refused():
    for answers, reason in (
        (("Yes", "Absolutely not"), "'Absolutely not' is no single first token"),
        (("Yes", "Yes"), "one and the same token"),
    ):
        with pytest.raises(ValueError, match=reason):
            tiny_judge(answers=answers)


def test_answers_are_read_where_the_template_ends():
    model, processor = tiny_parts()
    processor.chat_template = CHAT.replace("assistant\n", "assistant:")
    vocabulary = processor.tokenizer.get_vocab()
    judge = GenerativeJudge(model, processor, answers=(" Yes", " No"))
    assert (judge.yes, judge.no) == (vocabulary["ĠYes"], vocabulary["ĠNo"])


def test_a_processor_without_a_chat_template_is_refused():
    model, processor = tiny_parts()
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        GenerativeJudge(model, processor)


def test_lengths_and_channels_must_agree(judge):
    a = random_images(2)
    with pytest.raises(ValueError, match="`tasks` has 1 entries; expected 2"):
        judge.prepare_inputs(a, a, tasks=["fill"])
    with pytest.raises(ValueError, match="`images_1` has 1 entries; expected 2"):
        judge.prepare_inputs(a, a[:1])
    with pytest.raises(ValueError, match=r"shape \(2, 16, 16\); expected"):
        judge.prepare_inputs(a.repeat(1, 2, 1, 1), a)


def test_pictures_may_differ_in_size(judge):
    sizes = (16, 24)
    pairs = [[Image.fromarray(np.full((s, s), grey, np.uint8)) for s in sizes] for grey in (40, 200)]
    together = judge.compare(*pairs)
    alone = [judge.compare([a], [b]) for a, b in zip(*pairs, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("size", [16, 24])
def test_without_scaling_the_differentiable_pixels_are_those_of_the_processor(judge, size):
    a, b = random_images(2, 3, size), random_images(2, 3, size, seed=1)
    own, ours = (judge.prepare_inputs(a, b, differentiable=flag)["pixel_values"] for flag in (False, True))
    torch.testing.assert_close(ours, own, atol=1e-6, rtol=0)
    torch.testing.assert_close(judge.compare(a, b, differentiable=True), judge.compare(a, b), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [12, 20, 40, 64])
def test_scaled_pixels_agree_with_the_processor_to_a_grey_level(judge, size):
    a = smooth_images(4, size)
    own, ours = (judge.prepare_inputs(a, a, differentiable=flag)["pixel_values"] for flag in (False, True))
    # Pillow rounds to 8 bits after the rows and after the columns: at most about one and a quarter levels
    level = 1 / 255 / min(judge.processor.image_processor.image_std)
    assert (own - ours).abs().max() < 1.25 * level


@pytest.mark.parametrize("size", [16, 20])
@pytest.mark.parametrize("average_orders", [True, False])
def test_gradients_are_those_of_finite_differences(judge, size, average_orders):
    a, b = smooth_images(2, size), smooth_images(2, size, seed=1)
    settings = {"criterion": "realism", "average_orders": average_orders, "differentiable": True}
    x = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(judge.compare(x, b, **settings).sum(), x)
    assert (gradient != 0).all()
    directions = torch.randn(3, *a.shape, generator=torch.Generator().manual_seed(0))
    for direction in [*directions, gradient]:
        step = 0.1 * direction / direction.norm()
        with torch.no_grad():
            ups, downs = (judge.compare(a + k * step, b, **settings).sum().double() for k in (1, -1))
            far_ups, far_downs = (judge.compare(a + k * step, b, **settings).sum().double() for k in (2, -2))
        # five-point stencil: the error is of the fourth order in the step
        slope = (8 * (ups - downs) - (far_ups - far_downs)) / 12
        scale = gradient.norm() * step.norm()
        assert abs(slope - (gradient * step).sum()) < 1e-3 * scale


def test_climbing_the_gradient_raises_the_reward_until_the_cap(judge):
    """OneReward's equation 5, max(0, cap - P), with the gradient through the judge."""
    b = smooth_images(1, SIZE, seed=1)
    settings = {"average_orders": False, "differentiable": True}
    x = smooth_images(1, SIZE).requires_grad_()
    before = judge.compare(x, b, **settings).item()
    cap = before + 0.02
    optimizer = torch.optim.Adam([x], lr=0.01)
    for _ in range(60):
        loss = (cap - judge.compare(x.clamp(0, 1), b, **settings)).clamp(min=0).mean()
        optimizer.zero_grad()
        loss.backward()
        if loss == 0:
            break
        optimizer.step()
    assert judge.compare(x.detach().clamp(0, 1), b, average_orders=False).item() > before + 0.019
    assert loss == 0 and (x.grad == 0).all()


def test_gradients_do_not_reach_frozen_weights():
    judge = tiny_judge()
    judge.model.requires_grad_(False)
    x = random_images(1).requires_grad_()
    judge.compare(x, random_images(1, seed=1), differentiable=True).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in judge.model.parameters())


# ------------------------------------------------------------------------------------------------- another model


def make_llava(crop=SIZE):
    tokenizer = tiny_tokenizer()
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": crop, "width": crop}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=CHAT.replace("<|vision_start|>", "").replace("<|vision_end|>", ""),
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=crop, patch_size=4, **vision).to_dict(),
        text_config=LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **vision).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GenerativeJudge(LlavaForConditionalGeneration(config).eval(), processor)


def test_a_model_of_another_family_judges_with_gradients_too():
    judge = make_llava()
    a, b = random_images(2), random_images(2, seed=1).requires_grad_()
    plain = judge.compare(a, b)
    tuned = judge.compare(a, b, differentiable=True)
    torch.testing.assert_close(tuned, plain, atol=1e-6, rtol=0)
    tuned.sum().backward()
    assert b.grad.abs().sum() > 0


def test_a_processor_that_crops_judges_but_gives_no_gradients():
    judge = make_llava(crop=8)
    a, b = random_images(2), random_images(2, seed=1)
    assert judge.compare(a, b).shape == (2,)
    with pytest.raises(ValueError, match="CLIPImageProcessorPil and its differentiable counterpart disagree"):
        judge.compare(a, b, differentiable=True)


def test_an_image_cut_into_several_gives_no_gradients(judge):
    tiles = {"pixel_values": torch.zeros(3, 3, 8, 8)}
    with pytest.raises(ValueError, match="no differentiable counterpart"):
        preprocess([torch.zeros(3, 16, 16)] * 2, tiles, judge.processor.image_processor)


# ------------------------------------------------------------------------------------------------------- as a reward


def conditions(count, distinct):
    """`count` images of `distinct` conditions in turn: keyword arguments of a reward function."""
    which = [i % distinct for i in range(count)]
    masks = torch.zeros(count, 1, SIZE, SIZE)
    masks[:, :, 4:12, 4:12] = 1
    return {
        "images": random_images(count, seed=3),
        "masks": masks,
        "sources": random_images(distinct, seed=4)[which],
        "label_maps": masks.long(),
        "prompts": [f"prompt {i}" for i in which],
        "task": [("fill", "remove")[i % 2] for i in which],
        "case_id": [str(i) for i in which],
    }


def test_win_rates_count_wins_within_the_group(judge):
    rows = conditions(7, distinct=2)
    rewards = judge.score(**rows)
    assert list(rewards) == ["quality", "realism", "clinical_relevance"]
    for members in (range(0, 7, 2), range(1, 7, 2)):
        wins = dict.fromkeys(members, 0.0)
        for i, j in combinations(members, 2):
            sides = rows["images"][[i]], rows["images"][[j]]
            p = judge.compare(*sides, tasks=[rows["task"][i]], criterion="realism").item()
            wins[i if p > 0.5 else j] += 1
        for i, count in wins.items():
            assert rewards["realism"][i] == pytest.approx(count / (len(members) - 1))


def test_soft_win_rates_average_probabilities_and_ties_are_half_wins():
    first, second = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    p = torch.tensor([0.9, 0.6, 0.5])
    torch.testing.assert_close(win_rates(p, first, second, 4)[:3], torch.tensor([1.0, 0.25, 0.25]))
    torch.testing.assert_close(win_rates(p, first, second, 4, soft=True)[:3], torch.tensor([0.75, 0.3, 0.45]))
    assert win_rates(p, first, second, 4)[3].isnan()


def test_an_image_alone_in_its_group_is_not_scored(judge):
    assert all(values.isnan().all() for values in judge.score(**conditions(2, distinct=2)).values())


@pytest.mark.parametrize("kind", ["tensor", "pictures", "function"])
def test_images_are_compared_with_their_references(kind):
    rows = conditions(4, distinct=2)
    references = random_images(4, seed=5)
    if kind == "pictures":
        rows["before"] = [Image.fromarray((255 * image[0]).round().byte().numpy()) for image in references]
    else:
        rows["before"] = references

    def of_the_frozen_model(images, sources, task, before, **columns):
        assert len(images) == len(sources) == len(task) == 4 and "case_id" in columns
        return before

    judge = tiny_judge(reference=of_the_frozen_model if kind == "function" else "before", criteria=["realism"])
    expected = judge.compare(rows["images"], references, tasks=rows["task"], criterion="realism")
    torch.testing.assert_close(judge(**rows)["realism"], expected, atol=1e-6, rtol=0)


def test_a_reference_column_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`reference` is 'before', but the columns are \['case_id'\]"):
        tiny_judge(reference="before").score(**conditions(2, distinct=1))


def test_criteria_of_other_tasks_and_alignment_without_a_prompt_are_not_scored():
    judge = tiny_judge(criteria={"fill": ["realism", "text_alignment"], "remove": ["removal_quality"]})
    rows = conditions(8, distinct=4)  # two of each; conditions 0 and 2 are of the task "fill"
    rows["prompts"] = ["" if prompt == "prompt 2" else prompt for prompt in rows["prompts"]]
    scored = {name: (~values.isnan()).tolist() for name, values in judge.score(**rows).items()}
    assert scored == {
        "realism": [True, False] * 4,
        "text_alignment": [True, False, False, False] * 2,
        "removal_quality": [False, True] * 4,
    }
    with pytest.raises(ValueError, match=r"`task` is 'extend', but `criteria` knows \['fill', 'remove'\]"):
        judge.score(**{**rows, "task": ["extend"] * 8})


def test_heads_are_the_same_whatever_tasks_a_batch_holds():
    judge = tiny_judge(criteria={"fill": ["realism"], "remove": ["removal_quality"]}, prefix="judge/")
    scorer = RewardScorer([judge])
    both, one = conditions(4, distinct=2), conditions(2, distinct=1)
    rewards = scorer.collect([scorer.submit(one), scorer.submit(both)])
    assert scorer.names == ["judge/realism", "judge/removal_quality"] and rewards.shape == (6, 2)
    assert rewards[:2, 1].isnan().all() and rewards[2:, 1].isfinite().sum() == 2


# --------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def base(tmp_path):
    model, processor = tiny_parts()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_qwen_processor_loads_without_torchvision(base):
    _, made = tiny_parts()
    loaded = load_processor(base)
    pictures = [Image.fromarray(np.full((20, 20, 3), grey, np.uint8)) for grey in (3, 99)]
    ours, theirs = (
        p(images=pictures, text="<|image_pad|><|image_pad|> better?", return_tensors="pt") for p in (loaded, made)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert loaded.chat_template == CHAT
    assert json.loads((base / "processor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"


def test_a_processor_without_films_is_loaded_as_it_is(tmp_path):
    judge = make_llava()
    judge.save_pretrained(tmp_path)
    assert type(load_processor(tmp_path)) is type(AutoProcessor.from_pretrained(tmp_path))


def test_a_whole_model_comes_back_with_its_question(base, tmp_path):
    judge = GenerativeJudge.from_pretrained(
        base, criteria=["realism"], question="{first}{second}{criterion}?", wording={"realism": "like a scan"}
    )
    judge.save_pretrained(tmp_path / "judge")
    loaded = GenerativeJudge.from_pretrained(tmp_path / "judge")
    assert loaded.criteria == ["realism"] and loaded.ask("fill", "realism") == judge.ask("fill", "realism")
    a, b = random_images(3), random_images(3, seed=1)
    assert torch.equal(loaded.compare(a, b, criterion="realism"), judge.compare(a, b, criterion="realism"))


def test_an_adapter_comes_back_with_its_base_and_the_size_it_saw(base, tmp_path):
    judge = GenerativeJudge.from_pretrained(
        base, processor_kwargs={"size": {"shortest_edge": 576, "longest_edge": 1024}}
    )
    judge.model = get_peft_model(judge.model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    judge.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "judge_config.json",
    ]
    loaded = GenerativeJudge.from_pretrained(tmp_path / "adapter")
    a, b = random_images(2), random_images(2, seed=1)
    assert loaded.prepare_inputs(a, b)["image_grid_thw"].tolist() == 4 * [[1, 6, 6]]
    assert torch.equal(loaded.compare(a, b), judge.compare(a, b))
    assert not torch.equal(loaded.compare(a, b), tiny_judge().compare(a, b))
    assert not any(p.requires_grad for name, p in loaded.model.named_parameters() if "lora" in name)
    trainable = GenerativeJudge.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert all(p.requires_grad for name, p in trainable.model.named_parameters() if "lora" in name)


def test_pickled_adapters_are_not_read(base, tmp_path):
    judge = GenerativeJudge.from_pretrained(base)
    judge.model = get_peft_model(judge.model, LoraConfig(target_modules=["q_proj"]))
    judge.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="without adapter_model.safetensors. Pickles are not read"):
        GenerativeJudge.from_pretrained(tmp_path / "adapter")
