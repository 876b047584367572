"""Bitwise models: a tokenizer of D bits a token, and D codes a token in everything that handles tokens."""

import itertools
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Brightness
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.logger import Logger
from tiny import nudge, tiny_policy, weights_of

import agents
from agents import losses, recipes
from agents.policies import load_policy
from agents.rollout import act
from agents.sampling import Decoding, draw
from agents.sb3_policy import VARActorCriticPolicy
from agents.stage import cosine_similarities, group_similarity
from agents.testing import PolicyContract, TokenizerContract, random_grids
from var_env import ScaleSchedule, VARTextEnv, VARTextVectorEnv, load_tokenizer, mdp
from var_env.sb3 import FlattenCanvas, VARTextVecEnv
from var_env.tokenizers.bits import BitTokenizer, bit_entropies

D, EVERY = 5, range(3)


def bit_tokenizer(bits=D, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        schedule = ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16)
        return BitTokenizer(schedule, bits, width=8, blocks=1).eval().requires_grad_(False)


@pytest.fixture
def tokenizer():
    return bit_tokenizer()


@pytest.fixture
def parts(tokenizer):
    return {"tokenizer": tokenizer, "reward": Brightness()}


class TestTokenizerContract(TokenizerContract):
    def make_tokenizer(self):
        return bit_tokenizer()


class TestPolicyContract(PolicyContract):
    def make_policy(self):
        return tiny_policy(bit_tokenizer())


# The tokenizer --------------------------------------------------------------------------------------------------------


def test_encode_is_the_residual_quantiser_with_signs(tokenizer):
    """Against a loop over images, scales, places and all 2^D code vectors, which lie on the unit sphere."""
    images = torch.randint(256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grids = tokenizer.encode(images)
    corners = torch.tensor(list(itertools.product([0, 1], repeat=D)))
    vectors = (2 * corners - 1) / math.sqrt(D)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2**D))
    features = tokenizer.features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    for b in range(2):
        residual = features[b : b + 1]
        for t, size in enumerate(tokenizer.schedule.grids):
            small = F.interpolate(residual, size=size, mode="area")[0].flatten(1).T  # (n, D)
            codes = torch.stack([corners[(vector - vectors).norm(dim=1).argmin()] for vector in small])
            assert torch.equal(grids[t][b], codes)
            residual = residual - tokenizer.contribution(t, codes[None])


def test_there_is_no_codebook(tokenizer):
    assert not any("codebook" in name for name in tokenizer.state_dict())
    assert tokenizer.depth == tokenizer.channels == D and tokenizer.vocab_size == 2
    assert tiny_policy(tokenizer).to_code is None


def test_the_cosine_of_code_vectors_counts_bits(tokenizer):
    a, b = random_grids(tokenizer, 2)[2]  # (n, D)
    embedded = tokenizer.embed(2, torch.stack([a, b]))[None]  # one group of two, (1, 2, n, D)
    hamming = (a != b).sum(-1)
    expected = 1 - 2 * hamming / D
    torch.testing.assert_close(cosine_similarities(embedded)[0, :, 0, 1], expected)


def test_flipped_bits_and_what_later_grids_make_of_them(tokenizer):
    features = torch.randn(200, D, 4, 4, generator=torch.Generator().manual_seed(0))
    written, labels = tokenizer.quantise(features)
    assert all(torch.equal(a, b) for a, b in zip(written, labels, strict=True))
    written, labels = tokenizer.quantise(features, 0.2, torch.Generator().manual_seed(1))
    flipped = torch.cat(written, 1) != torch.cat(labels, 1)
    assert flipped.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert flipped.float().mean((0, 1)).tolist() == pytest.approx([0.2] * D, abs=0.02)
    residual = features
    for t in EVERY:
        assert torch.equal(labels[t], tokenizer.nearest(tokenizer.read(t, residual)))
        residual = residual - tokenizer.contribution(t, written[t])


def test_bit_entropies_against_the_softmax_over_all_codes():
    """BSQ's soft quantisation is a distribution over 2^D codes; its entropy is the sum of those of the bits."""
    vectors, sharpness = torch.randn(7, D, generator=torch.Generator().manual_seed(0)).double(), 1.7
    codes = (2 * torch.tensor(list(itertools.product([0, 1], repeat=D))) - 1) / math.sqrt(D)
    distances = torch.cdist(F.normalize(vectors, dim=1), codes.double()).square()
    p = (-sharpness * distances).softmax(1)  # (7, 2^D)
    undecided, used = bit_entropies(vectors, sharpness)
    assert undecided.item() == pytest.approx(-(p * p.log()).sum(1).mean().item() / D)
    ones = p.mean(0) @ (codes > 0).double()  # (D,), each bit's share of ones
    assert used.item() == pytest.approx(-(ones * ones.log() + (1 - ones) * (1 - ones).log()).mean().item())


def test_the_regularisation_has_the_right_signs():
    """To decide every bit and to use both of its values is what lowers the penalty, and its gradient is finite."""
    decided, used = bit_entropies(torch.tensor([[5.0, -5.0], [-5.0, 5.0]]), 50.0)
    assert decided < 1e-4 and used == pytest.approx(math.log(2))
    undecided, unused = bit_entropies(torch.tensor([[1e-4, 5.0], [1e-4, 5.0]]), 50.0)
    assert undecided == pytest.approx(math.log(2) / 2, rel=1e-3) and unused == pytest.approx(undecided.item(), rel=1e-3)
    vectors = torch.tensor([[100.0, 0.0], [0.0, 0.0]], requires_grad=True)
    sum(bit_entropies(vectors, 1e3)).backward()
    assert vectors.grad.isfinite().all()


def test_a_file_knows_its_class(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.safetensors", half=True)
    loaded = load_tokenizer(tmp_path / "t.safetensors")
    assert type(loaded) is BitTokenizer and loaded.depth == D
    policy = tiny_policy(tokenizer)
    policy.save(tmp_path / "p.safetensors")
    again, grids = load_policy(tmp_path / "p.safetensors", tokenizer), random_grids(tokenizer, 1)
    cond = policy.encode_prompts(['"A"'])
    assert torch.equal(again(cond, grids, EVERY), policy(cond, grids, EVERY))
    with pytest.raises(FileNotFoundError, match="none given"):
        BitTokenizer.load()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BitTokenizer(bits=0)


# The environment ------------------------------------------------------------------------------------------------------


def test_gymnasium_check_env_without_a_warning(parts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("VARText-v0", **parts).unwrapped)


def test_rows_of_the_batch_are_single_environments(parts):
    envs, single = VARTextVectorEnv(2, **parts), VARTextEnv(**parts)
    rng = np.random.default_rng(0)
    grids = [rng.integers(2, size=(2, h, w, D)) for h, w in envs.schedule.grids]
    ours, _ = envs.reset(seed=3)
    for row in range(2):
        observation, _ = single.reset(seed=3 + row)
        envs.reset(seed=3)
        for t, grid in enumerate(grids):
            ours, rewards, terminations, _, infos = envs.step(grid)
            observation, reward, over, _, info = single.step(grid[row])
            assert envs.observation_space.contains(ours) and single.observation_space.contains(observation)
            assert all(np.array_equal(ours[key][row], observation[key]) for key in ours)
            assert (terminations.all(), over) == (t == 2, t == 2) and rewards[row] == pytest.approx(reward)
        assert np.array_equal(infos["image"][row], info["image"])
    assert ours["tokens"].shape == (2, 21, D) and envs.action_space.shape == (2, 4, 4, D)


def test_read_action_takes_every_documented_shape(tokenizer):
    canvas = np.random.default_rng(0).integers(2, size=(3, 4, 4, D))
    exact = canvas[:, :2, :2]
    expected = exact.reshape(3, 4, D)
    for action in (canvas, exact, expected, torch.from_numpy(exact), exact.astype(np.uint8)):
        assert np.array_equal(mdp.read_action(tokenizer, 1, 3, action, batched=True), expected)
    for action in (canvas[0], exact[0], exact[0].tolist()):
        assert np.array_equal(mdp.read_action(tokenizer, 1, 1, action, batched=False), expected[:1])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.full((2, 2, D), 2), "token 2: use 0 to 1"),
        (np.full((2, 2, D), -1), "token -1: use 0 to 1"),
        (np.zeros((2, 2), int), r"canvas, \(4, 4, 5\), or of its grid, \(2, 2, 5\); got \(2, 2\)"),
        (np.zeros((2, 2, D + 1), int), r"got \(2, 2, 6\)"),
        (np.zeros((4, D), int), r"got \(4, 5\)"),
        (np.zeros((2, 2, D)), "integers, got dtype float64"),
    ],
)
def test_bad_actions(tokenizer, action, message):
    with pytest.raises(ValueError, match=message):
        mdp.read_action(tokenizer, 1, 1, action, batched=False)


def test_a_clone_of_another_depth_is_refused(parts):
    env, other = VARTextEnv(**parts), VARTextEnv(tokenizer=bit_tokenizer(3), reward=Brightness())
    other.reset(seed=0)
    with pytest.raises(ValueError, match="21 tokens of 3 codes, the environment's tokenizer has 21 of 5"):
        env.restore_state(other.clone_state())


def test_the_forms_of_a_token_in_frames(parts):
    env = VARTextEnv(render_mode="ansi", **parts)
    env.reset(seed=0)
    env.step(np.array([[[1, 0, 1, 0, 0]]]))
    assert "1x1  5\n" in env.render()  # the first bit is the lowest
    wide = bit_tokenizer(64)
    for mode in ("ansi", "rgb_array"):
        env = VARTextEnv(tokenizer=wide, reward=Brightness(), render_mode=mode)
        env.reset(seed=0)
        before = env.render()
        env.step(np.ones((1, 1, 64), int))
        ones = env.render()
        env.reset(seed=0)
        env.step(np.zeros((1, 1, 64), int))
        assert len({str(frame) if mode == "ansi" else frame.tobytes() for frame in (before, ones, env.render())}) == 3


# The sampler and the losses -------------------------------------------------------------------------------------------


def test_bits_are_drawn_independently_of_each_other():
    logits = torch.tensor([[0.0, 1.0], [0.0, -2.0], [0.0, 0.3]])  # (D, V)
    drawn = draw(logits.expand(20_000, 1, 3, 2), None, Decoding(), torch.Generator().manual_seed(0))
    ones = logits.softmax(-1)[:, 1]
    for bits in itertools.product([0, 1], repeat=3):
        chosen = torch.tensor(bits)
        expected = torch.where(chosen == 1, ones, 1 - ones).prod()
        share = (drawn.tokens[:, 0] == chosen).all(-1).float().mean()
        assert share.item() == pytest.approx(expected.item(), abs=0.01)
    torch.testing.assert_close(drawn.logp[0, 0], logits.log_softmax(-1)[range(3), drawn.tokens[0, 0]])


def test_a_truncated_sampler_keeps_the_likelier_bit_and_tells_what_it_left_out():
    logits = torch.randn(2, 3, D, 2, generator=torch.Generator().manual_seed(0))
    for decoding in (Decoding(top_k=1), Decoding(temperature=0.0), Decoding(top_p=0.5)):
        drawn = draw(logits, None, decoding, torch.Generator().manual_seed(0))
        assert torch.equal(drawn.tokens, logits.argmax(-1)) and not drawn.logp.any()
        assert drawn.support.sum(-1).eq(1).all()
        torch.testing.assert_close(drawn.tail_mass, logits.softmax(-1).min(-1).values)
        renormalised = losses.log_probs(logits, drawn.tokens, drawn.support)
        assert torch.equal(renormalised.logp, torch.zeros(2, 3))


def joint(logits):
    """All 2^D values of one token and their log-probabilities, from logits ``(D, 2)``."""
    values = torch.tensor(list(itertools.product([0, 1], repeat=len(logits))))
    return values, logits.log_softmax(-1)[range(len(logits)), values].sum(1)


def test_a_token_is_one_decision():
    """Log-probability, entropy, KL and ratio of D bits are those of one choice among 2^D values."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 1, 1, D, 2, generator=generator).double()
    values, logp = joint(logits[0, 0])
    ref_logp = joint(reference[0, 0])[1]
    assert logp.exp().sum().item() == pytest.approx(1)
    seen = losses.log_probs(logits, values[11].view(1, 1, D))
    assert seen.logp.item() == pytest.approx(logp[11].item())
    assert seen.entropy.item() == pytest.approx(-(logp.exp() * logp).sum().item())
    kl = (logp.exp() * (logp - ref_logp)).sum().item()
    full = losses.full_kl(logits.log_softmax(-1), reference.log_softmax(-1))
    assert full.shape == (1, 1) and full.item() == pytest.approx(kl)
    estimates = losses.kl_estimate(logp, ref_logp, "k3")  # of each value, which the policy draws with exp(logp)
    assert (logp.exp() * estimates).sum().item() == pytest.approx(kl)
    ratio = losses.policy_ratio(seen.logp, losses.log_probs(reference, values[11].view(1, 1, D)).logp)
    assert ratio.item() == pytest.approx((logp[11] - ref_logp[11]).exp().item())


# Agents ---------------------------------------------------------------------------------------------------------------


def bit_agent(parts, recipe="grpo", **options):
    settings = {"group_size": 4, "prompts_per_update": 2, "seed": 0, "device": "cpu"} | options
    settings = {name: value for name, value in settings.items() if name in recipes.options_in(recipe)}
    agent = agents.make(recipe, VARTextVectorEnv(2, **parts), tiny_policy(parts["tokenizer"]), **settings)
    agent.unwrapped.set_logger(Logger(None, []))
    return agent


ALGORITHMS = [name for name, part in recipes.known().items() if not recipes.is_wrapper(part)]
WRAPPERS = [name for name, part in recipes.known().items() if recipes.is_wrapper(part)]


CHAIN = ["local", *(name for name in WRAPPERS if name != "local")]  # it must be inside of those that change advantages


@pytest.mark.parametrize("recipe", [*ALGORITHMS, "+".join(["grpo", *CHAIN])])
def test_every_agent_runs(parts, recipe):
    agent = bit_agent(parts, recipe, learning_rate=1e-3)
    before = weights_of(agent.unwrapped.policy)
    agent.learn(1, log_interval=100)
    if recipe == "best_of_n":
        return  # it has no weights to learn
    while agent.unwrapped.n_updates < 2:
        agent.learn(1, log_interval=100, reset_num_timesteps=False)
    after = weights_of(agent.unwrapped.policy)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    values = agent.unwrapped.logger.name_to_value.items()
    assert all(np.isfinite(value) for _, value in values if isinstance(value, float))


@pytest.mark.parametrize("support", ["model", "sampler"])
def test_the_first_ratios_are_one_and_tokens_weigh_their_bits(parts, support):
    """What the loss sees of a rollout, against sums over bits of the policy's own distribution."""
    agent = bit_agent(parts, support=support, decoding=Decoding(top_p=0.8), kl="full", entropy_coef=0.1)
    nudge(agent)
    rollout = agent.sample()
    rows = torch.arange(8)
    seen = agent.log_probs(agent.policy, rollout, rows, EVERY)
    logits = agent.policy(rollout.cond, rollout.grids, EVERY)  # (8, 21, D, 2)
    if support == "sampler":
        logits = logits.masked_fill(~torch.cat([draw.support for draw in rollout.draws], 1), -torch.inf)
    chosen = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(seen.logp, chosen.log_prob(torch.cat(rollout.grids, 1)).sum(-1))
    torch.testing.assert_close(seen.entropy, chosen.entropy().sum(-1))
    weights = agent.token_weights(rollout, EVERY)
    loss, tokens = agent.loss(rollout, rows, torch.ones(8), agent.aggregate(weights, EVERY), None, EVERY)
    assert torch.equal(tokens.ratio, torch.ones(8, 21)) and tokens.kl.shape == (8, 21) and loss.isfinite()
    sampler = torch.cat([draw.logp for draw in rollout.draws], 1)
    assert sampler.shape == (8, 21, D)
    if support == "sampler":  # then the gap is rounding alone
        assert tokens.behaviour_gap.abs().max() < 1e-4


@pytest.mark.parametrize("on", ["codes", "canvas"])
def test_stage_compares_bits(parts, on):
    agent = bit_agent(parts)
    rollout = agent.judge(agent.sample(), EVERY)
    similarity = group_similarity(agent, rollout, EVERY, on)  # (2, 4, 21)
    assert similarity.shape == (2, 4, 21)
    if on == "canvas":
        return
    bits = torch.cat(rollout.grids, 1).unflatten(0, (2, 4))  # (P, G, n, D)
    advantages = rollout.advantages.view(2, 4)
    for p, g, n in itertools.product(range(2), range(4), (0, 7, 20)):
        others = [h for h in range(4) if advantages[p, g] * advantages[p, h] <= 0]
        alike = [1 - 2 * (bits[p, g, n] != bits[p, h, n]).sum().item() / D for h in others]
        assert similarity[p, g, n].item() == pytest.approx(np.mean(alike), abs=1e-5)


def test_an_agent_survives_its_file(parts, tmp_path):
    agent = bit_agent(parts, "vmr+panw+mp", split=2)
    agent.learn(agent.unwrapped.timesteps(8), log_interval=100)
    agent.save(tmp_path / "agent.zip")
    loaded = agents.load(tmp_path / "agent.zip", VARTextVectorEnv(2, **parts), device="cpu")
    assert isinstance(loaded.unwrapped.policy.tokenizer, BitTokenizer)
    for name, weight in weights_of(agent.unwrapped.policy).items():
        assert torch.equal(weights_of(loaded.unwrapped.policy)[name], weight)


def test_a_policy_of_another_tokenizer_is_refused(parts):
    agent = bit_agent(parts)
    for other in (bit_tokenizer(seed=1), bit_tokenizer(3)):
        with pytest.raises(ValueError, match="different tokenizers"):
            agent.set_env(VARTextVectorEnv(2, tokenizer=other, reward=Brightness()))
    copy = bit_tokenizer()  # another object, the same weights
    agent.set_env(VARTextVectorEnv(2, tokenizer=copy, reward=Brightness()))
    assert agent.env.tokenizer is copy


def test_act_gives_the_next_grid_at_any_scale(parts):
    policy, env = tiny_policy(parts["tokenizer"]), VARTextEnv(**parts)
    observation, _ = env.reset(seed=0)
    for t in EVERY:
        action = act(policy, observation, Decoding(temperature=0.0))
        assert action.shape == (4, 4, D) and env.action_space.contains(action)
        cond = policy.encode_prompts([env.scene.prompt])
        grids = [torch.from_numpy(observation["tokens"])[None, part] for part in policy.schedule.slices[:t]]
        h, w = policy.schedule.grids[t]
        likeliest = policy(cond, grids, range(t, t + 1)).argmax(-1).view(h, w, D)
        assert np.array_equal(action[:h, :w], likeliest.numpy()) and not action[h:].any() and not action[:, w:].any()
        observation, *_ = env.step(action)


# Stable-Baselines3 ----------------------------------------------------------------------------------------------------


def test_flat_actions(parts):
    """SB3 would rather have a flat observation than (L, D), and says so; nothing else."""
    env = FlattenCanvas(gym.make("VARText-v0", **parts))
    assert env.action_space == gym.spaces.MultiDiscrete([2] * (16 * D))
    with pytest.warns(UserWarning, match="unconventional shape") as seen:
        sb3_check_env(env)
    assert all("unconventional shape" in str(warning.message) for warning in seen)
    other = gym.make("VARText-v0", **parts)
    for wrapped in (env, other):
        wrapped.reset(seed=0)
    flat = np.random.default_rng(0).integers(2, size=16 * D)
    assert np.array_equal(env.step(flat)[0]["tokens"], other.step(flat.reshape(4, 4, D))[0]["tokens"])


@pytest.mark.parametrize("policy", ["MultiInputPolicy", VARActorCriticPolicy])
def test_sb3s_ppo_runs(parts, policy):
    env = VARTextVecEnv(VARTextVectorEnv(2, **parts))
    own = {"policy_kwargs": {"policy": tiny_policy(parts["tokenizer"])}} if policy is VARActorCriticPolicy else {}
    model = PPO(policy, env, n_steps=6, batch_size=6, n_epochs=1, seed=0, device="cpu", **own)
    before = weights_of(model.policy)
    model.learn(24)
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(model.policy).items())


def test_sb3_log_probabilities_are_sums_over_tokens_and_bits(parts):
    env = VARTextVecEnv(VARTextVectorEnv(2, **parts))
    policy = tiny_policy(parts["tokenizer"])
    model = PPO(VARActorCriticPolicy, env, n_steps=6, batch_size=6, policy_kwargs={"policy": policy}, device="cpu")
    env.seed(0)
    observation = env.reset()
    env.step(np.random.default_rng(0).integers(2, size=(2, 16 * D)))
    observation = {key: torch.from_numpy(part) for key, part in env.step(np.zeros((2, 16 * D), int))[0].items()}
    with torch.no_grad():
        actions, _, logp = model.policy(observation)
        again = model.policy.evaluate_actions(observation, actions)
    torch.testing.assert_close(again[1], logp)
    cond = policy.encode_prompts([scene.prompt for scene in env.envs.scenes])
    logits = policy(cond, env.envs.grids, range(2, 3))
    chosen = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logp, chosen.log_prob(actions.view(2, 16, D)).sum((1, 2)))
    torch.testing.assert_close(again[2], chosen.entropy().sum((1, 2)))


# The scripts ----------------------------------------------------------------------------------------------------------


def test_pretraining_and_an_image(tmp_path, monkeypatch, capsys):
    from agents.experiments import play, pretrain

    small = ["--batch", "4", "--log-every", "3", "--image-every", "100", "--device", "cpu"]
    small += ["--tokenizer-steps", "6", "--policy-steps", "3", "--width", "32", "--layers", "1", "--heads", "2"]

    def run(stage, *options):
        pretrain.main([stage, "--out", str(tmp_path), *small, *options])
        return capsys.readouterr().out

    assert "used_bits" in run("tokenizer", "--bits", "4")
    loss = float(run("policy").split("  loss ")[1].split()[0])
    assert loss == pytest.approx(4 * math.log(2), rel=0.1)  # nats a token, at first those of 4 fair coins
    with pytest.raises(SystemExit, match="no place for a BitTokenizer"):
        run("export")
    with pytest.raises(SystemExit):
        run("tokenizer", "--bits", "4", "--schedule", "raster")
    assert "got 4, raster" in capsys.readouterr().err
    files = [f"--{part}={tmp_path / part}.safetensors" for part in ("tokenizer", "policy")]
    assert play.main([*files, "--device", "cpu", "--seed", "0", "--quiet", f"--gif={tmp_path / 'a.gif'}"]) == 0
    assert (tmp_path / "a.gif").stat().st_size > 0
