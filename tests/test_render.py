"""Pictures of episodes: the right ones, with true returns, and drawn where the state says."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pgjax
from pgjax import cli
from pgjax.evaluation import evaluate
from pgjax.experiments.evaluate_run import acting, episode_keys, evaluate_run
from pgjax.experiments.render import bodies, classic, gif, grids, opengl, render_run
from pgjax.experiments.render.canvas import CAPTION_HEIGHT, HEIGHT, WIDTH, caption_sizes, with_caption
from pgjax.experiments.render.drawings import drawing_of
from pgjax.experiments.render.episodes import Episode, pick, play
from pgjax.experiments.render.gif import encode, pace_of
from pgjax.experiments.render.page import Shown, make_page

ORANGE, GREEN, RED, BLUE, INK = (230, 159, 0), (0, 158, 115), (213, 94, 0), (0, 114, 178), (34, 34, 34)


def color_at(canvas, point):
    x, y = canvas.pixel(point)
    return canvas.finish().getpixel((round(x - 0.5), round(y - 0.5)))


def untrained(name, **options):
    algorithm = pgjax.make("ppo", pgjax.make_env(name, **options), num_envs=2, num_steps=8)
    return algorithm, algorithm.policy(algorithm.init(jax.random.key(1), algorithm.hypers))


# --- which episodes


def test_picks():
    assert pick([3.0, 1.0, 2.0, 5.0, 4.0]) == {"best": 3, "median": 0, "worst": 1}
    assert pick([3.0, 1.0, 2.0, 4.0]) == {"best": 3, "median": 2, "worst": 1}, "the lower median of an even number"
    assert pick([7.0]) == {"best": 0, "median": 0, "worst": 0}
    assert pick([1.0, float("nan"), -5.0])["worst"] == 1
    assert len(set(pick([500.0] * 8).values())) == 3, "of equal returns three different ones are shown"


# Acrobot never ends by itself under an untrained policy within 30 steps; 150 is not a multiple of the steps played at once.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gymnax/CartPole-v1", {}),
        ("gymnax/CartPole-v1", {"reset_mode": "pool"}),
        ("gymnax/Acrobot-v1", {"episode_length": 30}),
        ("gymnax/Pendulum-v1", {"episode_length": 150}),
    ],
)
def test_the_returns_are_those_of_evaluation(name, options):
    algorithm, policy = untrained(name, **options)
    drawing = drawing_of(algorithm.env)
    episodes = play(algorithm, policy, jax.random.key(3), 5, drawing.view)
    expected = evaluate(algorithm, policy, jax.random.key(3), 5)
    assert [(episode.policy, episode.index) for episode in episodes] == [(p, i) for p in ("mode", "sample") for i in range(5)]
    for episode in episodes:
        return_ = getattr(expected, f"{episode.policy}_return")[episode.index]
        np.testing.assert_allclose(episode.return_, return_, rtol=1e-5)
        assert episode.length == getattr(expected, f"{episode.policy}_length")[episode.index] == len(episode.action)
        assert {len(x) for x in jax.tree.leaves(episode.view)} == {episode.length + 1}
        assert episode.return_ == episode.reward.sum(dtype=np.float64) == episode.returns[-1]


def test_what_is_kept_is_what_happened():
    """Playing the kept actions from the kept start again gives the kept states and rewards, and the end is really seen."""
    algorithm, policy = untrained("gymnax/CartPole-v1")
    env = algorithm.env
    episode = play(algorithm, policy, jax.random.key(0), 2, drawing_of(env).view)[3]
    assert episode.terminated
    state = jax.tree.map(lambda x: jnp.asarray(x[:1]), episode.view)
    step = jax.jit(env.advance)
    total = 0.0
    for t, action in enumerate(episode.action):
        state, timestep = step(jax.random.split(jax.random.key(t), 1), state, action[None], env.default_params)
        np.testing.assert_allclose(state.theta[0], episode.view.theta[t + 1], rtol=1e-4, atol=1e-6)
        total += float(timestep.reward[0])
    assert total == episode.return_
    last = jax.tree.map(lambda x: x[-1], episode.view)
    params = env.default_params
    fallen = abs(last.theta) > params.theta_threshold_radians or abs(last.x) > params.x_threshold
    assert fallen, "the last state is the one that ended the episode, not the first of the next"


@pytest.mark.parametrize("name", ["mujoco/Hopper-v5", "mujoco/Humanoid-v5"])
def test_advancing_c_mujoco_restarts_nothing(name):
    env = pgjax.make_env(name)
    params = env.default_params
    step, advance = jax.jit(env.step), jax.jit(env.advance)
    state, _ = env.reset(jax.random.split(jax.random.key(0), 3), params)
    for t in range(200):
        key = jax.random.split(jax.random.key(t), 3)
        action = jax.random.uniform(jax.random.key(1000 + t), (3, *env.action_space.shape), minval=-0.4, maxval=0.4)
        (stepped, here), (advanced, there) = step(key, state, action, params), advance(key, state, action, params)
        for field in ("reward", "terminated", "truncated", "final_obs"):
            np.testing.assert_array_equal(getattr(here, field), getattr(there, field))
        np.testing.assert_array_equal(there.obs, here.final_obs)
        ended = np.asarray(here.terminated)
        np.testing.assert_array_equal(np.asarray(advanced.bits)[~ended], np.asarray(stepped.bits)[~ended])
        if ended.any():
            assert (np.asarray(advanced.bits) != np.asarray(stepped.bits))[ended].any(-1).all()
            return
        state = stepped
    pytest.fail("no episode ended")


# --- where things are


@pytest.mark.parametrize("theta", [0.0, 0.2, -0.15, np.pi / 2])
@pytest.mark.parametrize("x", [0.0, -1.5])
def test_cartpole_geometry(theta, x):
    params = pgjax.make_env("gymnax/CartPole-v1").default_params
    state = SimpleNamespace(x=x, theta=theta)
    canvas = classic.cartpole(state, params, action=1)
    # Written out again: the pole is 2 * 0.5 long, and leans to the right for a positive angle.
    almost = (x + 0.95 * np.sin(theta), 0.95 * np.cos(theta))
    assert color_at(canvas, almost) == ORANGE
    assert color_at(canvas, (x + 1.15 * np.sin(theta), 1.15 * np.cos(theta))) != ORANGE
    np.testing.assert_allclose(classic.cartpole_tip(state, params), (x + np.sin(theta), np.cos(theta)), atol=1e-6)
    assert color_at(canvas, (x - 0.2, -0.05)) == BLUE
    assert color_at(canvas, (x + 0.45, 0.0)) == GREEN, "pushed to the right"
    assert color_at(canvas, (x - 0.45, 0.0)) != GREEN
    left, right = canvas.pixel((-params.x_threshold, 0)), canvas.pixel((params.x_threshold, 0))
    assert 0 < left[0] < right[0] < WIDTH


def test_acrobot_geometry():
    params = pgjax.make_env("gymnax/Acrobot-v1").default_params
    hanging = SimpleNamespace(joint_angle1=0.0, joint_angle2=0.0)
    np.testing.assert_allclose(classic.acrobot_joints(hanging, params), [(0, 0), (0, -1), (0, -2)], atol=1e-6)
    bent = SimpleNamespace(joint_angle1=np.pi / 2, joint_angle2=np.pi / 2)
    np.testing.assert_allclose(classic.acrobot_joints(bent, params), [(0, 0), (1, 0), (1, 1)], atol=1e-6)
    canvas = classic.acrobot(bent, params, action=2)
    assert color_at(canvas, (1.0, 0.0)) == ORANGE
    assert color_at(canvas, (-1.0, 1.0)) == GREEN, "the line to rise above"


def test_acrobot_ends_when_its_tip_is_above_the_line():
    """The adapter's own verdict on random postures is that of the picture."""
    env = pgjax.make_env("gymnax/Acrobot-v1")
    keys = jax.random.split(jax.random.key(0), 256)
    state, _ = env.reset(keys, env.default_params)
    angles = jax.random.uniform(jax.random.key(1), (2, 256), minval=-np.pi, maxval=np.pi)
    state = state.replace(joint_angle1=angles[0], joint_angle2=angles[1])
    state, timestep = env.advance(keys, state, jnp.ones(256, jnp.int32), env.default_params)
    tips = [classic.acrobot_joints(jax.tree.map(lambda x: x[i], state), env.default_params)[2] for i in range(256)]  # noqa: B023
    heights = np.array([height for _, height in tips])
    clear = np.abs(heights - 1) > 1e-4
    np.testing.assert_array_equal(np.asarray(timestep.terminated)[clear], (heights > 1)[clear])
    assert timestep.terminated.any() and not timestep.terminated.all()


@pytest.mark.parametrize("position", [-1.0, -np.pi / 6, 0.0, 0.3])
def test_mountain_car_stands_on_the_hill(position):
    params = pgjax.make_env("gymnax/MountainCar-v0").default_params
    canvas = classic.mountain_car(SimpleNamespace(position=position), params, action=2)
    height = 0.55 + 0.45 * np.sin(3 * position)
    slope = np.arctan(3 * 0.45 * np.cos(3 * position))
    body = (position - 0.055 * np.sin(slope), height + 0.055 * np.cos(slope))
    assert color_at(canvas, body) == BLUE
    assert color_at(canvas, (position, height - 0.1)) == (238, 238, 238), "ground"
    assert color_at(canvas, (params.goal_position - 0.04, 0.55 + 0.45 * np.sin(3 * params.goal_position) + 0.2)) == GREEN
    # The slope that the equations of motion know, cos(3x), is the hill's.
    x = np.linspace(-1.2, 0.6, 50)
    rise = np.gradient(classic.hill(x), x)[1:-1]
    np.testing.assert_allclose(rise / 1.35, np.cos(3 * x)[1:-1], atol=5e-3)


def test_pendulum_geometry():
    params = pgjax.make_env("gymnax/Pendulum-v1").default_params
    up, left = (classic.pendulum_tip(SimpleNamespace(theta=theta), params) for theta in (0.0, np.pi / 2))
    np.testing.assert_allclose([up, left], [(0, 1), (-1, 0)], atol=1e-6)
    canvas = classic.pendulum(SimpleNamespace(theta=0.0), params, action=np.array([2.0]))
    assert color_at(canvas, (0, 0.9)) == RED and color_at(canvas, (0, -0.5)) == (255, 255, 255)

    # Counter-clockwise, as the angle grows: the arc ends on the left, with a head.
    def green(side):
        picture = np.asarray(canvas.finish()).astype(int)
        half = picture[:, : WIDTH // 2] if side == "left" else picture[:, WIDTH // 2 :]
        return (np.abs(half - GREEN).sum(-1) < 30).sum()

    assert green("left") > 1.3 * green("right") > 0


def test_board_cells():
    obs = np.zeros((10, 10, 4), np.uint8)
    obs[9, 3, 0] = obs[2, 5, 3] = obs[2, 5, 1] = obs[4, 0, 2] = 1
    obs[3, :, 3] = 1
    channels = grids.CHANNELS["MinBreakout"]
    picture = grids.board(obs, channels).finish()

    def cell(row, column):
        x, y = grids.cell_center((10, 10), row, column)
        return picture.getpixel((round(x), round(y)))

    assert cell(9, 3) == channels[0][1] and cell(4, 0) == channels[2][1] and cell(3, 9) == channels[3][1]
    assert cell(2, 5) == channels[1][1], "the ball is seen before the bricks"
    assert cell(0, 0) == cell(9, 4) == (24, 26, 34)


@pytest.mark.parametrize("name", ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"])
def test_every_minatar_channel_has_a_colour(name):
    env = pgjax.make_env(f"gymnax/{name}-MinAtar")
    assert len(grids.CHANNELS[type(env.source).__name__]) == env.observation_space.shape[-1]
    assert "colour" in drawing_of(env).about


def hopper_episode(angle=0.0, x=0.0, steps=3):
    """A Hopper that stands still in the air, its torso tilted."""
    env = pgjax.make_env("mujoco/Hopper-v5")
    drawing = drawing_of(env)
    state, _ = env.reset(jax.random.split(jax.random.key(0), 1), env.default_params)
    numbers = np.asarray(env.integration_state(state)).view(np.float64).copy()
    numbers[0, 1:7] = [x, 1.25, angle, 0, 0, 0]  # after the time: x, height, angles
    view = np.repeat(numbers.view(np.uint32), steps + 1, 0)
    return env, drawing, Episode("mode", 0, view, np.zeros((steps, 3)), np.ones(steps), False)


def test_bodies_are_where_the_simulation_has_them():
    env, _, episode = hopper_episode(angle=0.3, x=7.0)
    simulation = bodies.simulation_of(env)
    scene = bodies.Scene(simulation, episode.view)
    shot = scene.shot()
    assert shot.is_side and scene.follows
    canvas = scene.draw(2, shot)
    torso = env.model.geom("torso_geom").id
    middle = (scene.data.geom_xpos[torso] - shot.targets[2]) @ shot.axes.T
    assert abs(scene.data.qpos[0] - 7.0) < 1e-9
    color = color_at(canvas, middle[:2])
    assert color == tuple(int(255 * c) for c in env.model.geom_rgba[torso][:3])
    # The torso's upper end is to the right for a positive pitch, 0.2 from its middle along its axis.
    for sign, inside in ((0.9, True), (1.5, False)):
        end = middle[:2] + sign * 0.2 * np.array([np.sin(0.3), np.cos(0.3)])
        assert (color_at(canvas, end) == color) == inside
    # All of it is in the picture at all times.
    assert 0 < canvas.pixel(middle)[0] < WIDTH and 0 < canvas.pixel(middle)[1] < HEIGHT


def test_camera_axes_are_mujoco_s():
    np.testing.assert_allclose(bodies.Shot(90, 0, np.zeros((1, 3)), 1).axes, [[1, 0, 0], [0, 0, 1], [0, 1, 0]], atol=1e-9)
    np.testing.assert_allclose(bodies.Shot(90, -90, np.zeros((1, 3)), 1).axes, [[1, 0, 0], [0, 1, 0], [0, 0, -1]], atol=1e-9)


@pytest.mark.parametrize(
    ("name", "seen"),
    [("Walker2d-v5", "side"), ("HalfCheetah-v5", "side"), ("InvertedDoublePendulum-v5", "side"), ("Swimmer-v5", "top"),
     ("Reacher-v5", "top"), ("Ant-v5", "oblique"), ("Humanoid-v5", "oblique"), ("Pusher-v5", "oblique")],
)  # fmt: skip
def test_directions(name, seen):
    model = pgjax.make_env(f"mujoco/{name}").model
    shot = bodies.Shot(*bodies._direction(model), np.zeros((1, 3)), 1.0)
    assert (shot.is_side, shot.is_top) == (seen == "side", seen == "top")
    walks = name.startswith(("Walker", "Half", "Swim", "Ant", "Humanoid"))
    assert (bodies._wanderer(model) is not None) == walks, "the camera follows who walks"


def test_hull():
    points = np.array([(0, 0), (2, 0), (2, 2), (0, 2), (1, 1), (1, 0), (0.5, 1.5)], float)
    assert set(bodies._hull(points)) == {(0, 0), (2, 0), (2, 2), (0, 2)}


def test_brax_bodies_are_brax_s_own():
    """Shapes are placed by the backend's links; at a start these agree with what MuJoCo makes of the joints."""
    env = pgjax.make_env("brax/inverted_pendulum", backend="generalized")
    simulation = bodies.simulation_of(env)
    state, obs = jax.jit(env.reset)(jax.random.split(jax.random.key(0), 1), env.default_params)
    view = jax.tree.map(np.asarray, simulation.view(state, obs))
    scene = bodies.Scene(simulation, view)
    scene.go_to(0)
    placed = scene.data.geom_xpos.copy(), scene.data.geom_xmat.copy()
    bodies._derive(scene.model, scene.data)
    np.testing.assert_allclose(placed[0], scene.data.geom_xpos, atol=1e-5)
    np.testing.assert_allclose(placed[1], scene.data.geom_xmat, atol=1e-5)


# --- files


@pytest.mark.parametrize(
    ("length", "seconds"),
    [(37, 0.02), (37, float(np.float32(0.02))), (500, 0.02), (1000, 0.008), (1000, 0.05), (93, 0.2), (200, None)],
)
def test_pace(length, seconds):
    pace = pace_of(length, seconds)
    frames, durations = pace.frames(length), pace.durations(length)
    assert frames[0] == 0 and frames[-1] == length and len(frames) <= 252 and len(frames) == len(durations)
    assert min(durations) >= 20, "what is faster is slowed down by browsers"
    if seconds is None:
        assert pace.speed is None
        return
    lasts = sum(durations[:-1]) / 1000
    np.testing.assert_allclose(lasts * pace.speed, length * seconds, atol=0.05 * length * seconds + 0.03)
    assert pace.speed == pytest.approx(2 if (length, seconds) == (1000, 0.05) else 1)


def test_a_gif_stays_below_its_size_and_says_so(monkeypatch):
    monkeypatch.setattr(gif, "MAX_BYTES", 100_000)
    rng = np.random.default_rng(0)
    said = []

    def noise(t, pace):
        said.append(str(pace))
        return Image.fromarray(rng.integers(0, 255, (80, 100, 3), dtype=np.uint8))

    content, pace = encode(noise, 60, 0.02)
    assert len(content) <= 100_000 and pace.every > 1 and f"every {pace.every}th step" in said[-1]
    assert len(pace.frames(60)) > 60_000 // len(noise(0, pace).tobytes()), "and is not thinned more than needed"
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == len(pace.frames(60))  # pyright: ignore[reportAttributeAccessIssue]


def test_long_captions_are_cut():
    picture = with_caption(Image.new("RGB", (WIDTH, HEIGHT), "white"), lines := ["w" * 300, "short"], caption_sizes(lines))
    assert picture.size == (WIDTH, HEIGHT + CAPTION_HEIGHT)
    dark = np.asarray(picture.convert("L"))[HEIGHT + 2 :] < 128
    assert dark[:, :6].sum() == 0 and dark[:, -6:].sum() == 0 and dark.sum() > 100


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_escaped():
    evil = '<script>alert("x")</script>&\'"'
    shown = [Shown(f"{evil}.gif", "mode", evil, b"GIF89a", [evil, evil])]
    text = make_page(evil, [evil], shown, {"mode": evil}, evil)
    parsed = Page(text)
    assert "script" not in parsed.tags and "<script" not in text
    assert parsed.text.count(evil) >= 6
    assert parsed.loads == ["data:image/gif;base64,R0lGODlh"]
    assert not re.search(r"https?://|url\(", text)
    assert "default-src 'none'; img-src data:" in text


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "cart & pole"
    options = ["--seeds", "2", "--seed-start", "4", "--total-env-steps", "1024", "--num-evals", "0", "--out", str(folder)]
    assert cli._main(["train", "ppo", "--env", "gymnax/CartPole-v1", *options]) == 0
    return folder


def test_render_writes_what_it_says(run, capsys):
    assert cli._main(["render", str(run), "--episodes", "5", "--seed", "2", "--lane", "1"]) == 0
    said = capsys.readouterr().out
    out = run / "render"
    names = {f"{policy}-{pick}.gif" for policy in ("mode", "sample") for pick in ("best", "median", "worst")}
    assert {path.name for path in out.iterdir()} == names | {"index.html", "episodes.csv"}
    assert said.strip().splitlines()[-1] == str(out / "index.html")

    expected = evaluate_run(run, None, {}, 5, 2, [1])
    rows = list(csv.DictReader(io.StringIO((out / "episodes.csv").read_text())))
    assert [(row["policy"], int(row["episode"])) for row in rows] == list(zip(expected.policy, expected.episode, strict=True))
    np.testing.assert_allclose([float(row["return"]) for row in rows], expected["return"], rtol=1e-5)
    np.testing.assert_array_equal([int(row["length"]) for row in rows], expected.length)

    text = (out / "index.html").read_text()
    parsed = Page(text)
    assert len(parsed.loads) == 6 and all(load.startswith("data:image/gif;base64,") for load in parsed.loads)
    assert "cart & pole" in parsed.text and "seed 5" in parsed.text
    for policy in ("mode", "sample"):
        returns = sorted(float(row["return"]) for row in rows if row["policy"] == policy)
        for name, return_ in (("worst", returns[0]), ("median", returns[2]), ("best", returns[4])):
            assert f"{name}: return {return_:.2f}" in parsed.text
            shown = [row for row in rows if row["policy"] == policy and name in row["shown_as"].split()]
            assert [float(row["return"]) for row in shown] == [return_]
            with Image.open(out / f"{policy}-{name}.gif") as image:
                assert image.size == (WIDTH, HEIGHT + CAPTION_HEIGHT)
                length = int(shown[0]["length"])
                assert image.n_frames == len(pace_of(length, 0.02).frames(length))  # pyright: ignore


def test_render_of_a_lane_does_not_depend_on_others(run):
    """The same lane by itself and among all of them starts from the same keys."""
    columns = acting(run)[2]
    both, alone = episode_keys(0, columns), episode_keys(0, acting(run, lanes=[1])[2])
    assert jax.random.key_data(both)[1].tolist() == jax.random.key_data(alone)[0].tolist()


def test_render_in_another_environment(run, tmp_path):
    out = tmp_path / "deep" / "pictures"
    rendered = render_run(run, out, env_options={"episode_length": 7}, num_episodes=1, say=lambda line: None)
    assert rendered.page == out / "index.html"
    assert all(episode.length == 7 and not episode.terminated for episode in rendered.episodes)


def test_an_environment_without_a_drawing_shows_its_observations():
    algorithm, policy = untrained("gymnax/FourRooms-misc", episode_length=6)
    drawing = drawing_of(algorithm.env)
    assert "no drawing" in drawing.about
    episode = play(algorithm, policy, jax.random.key(0), 1, drawing.view)[1]
    paint = drawing.painter(episode)
    assert paint(0).size == paint(episode.length).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--lane", "2"], ["--lane 2", "0 to 1"]),
        (["--lane", "-1"], ["--lane -1", "0 to 1"]),
        (["--episodes", "0"], ["--episodes 0", "at least 1"]),
        (["--env", "gymnax/Acrobot-v1"], ["--env gymnax/Acrobot-v1", "observation_space"]),
        (["--env-option", "episode_lenght=3"], ["episode_lenght", "episode_length"]),
        (["--renderer", "povray"], ["--renderer", "povray", "plain"]),
        (["--out", "/dev/null"], ["--out /dev/null", "folder"]),
        (["--seed", "-1"], ["--seed -1", "at least 0"]),
        (["--pisode", "3"], ["--pisode", "--episodes"]),
    ],
)
def test_wrong_requests(run, refuse, extra, words):
    refuse(["render", str(run), *extra], words)


def test_no_run(refuse):
    refuse(["render", "/nowhere/at/all"], ["/nowhere/at/all"])
    refuse(["render"], ["--run"])


def test_choice_of_the_renderer(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(opengl, "find_backend", lambda: None)
    assert opengl.choose("auto")[0] == opengl.choose("plain")[0] == "plain"
    with pytest.raises(pgjax.RequestError, match="--renderer opengl"):
        opengl.choose("opengl")
    monkeypatch.setattr(opengl, "find_backend", lambda: ("egl", "llvmpipe (LLVM 15)"))
    assert opengl.choose("auto")[0] == "plain" and "llvmpipe" in opengl.choose("auto")[1]
    assert opengl.choose("opengl")[0] == "opengl"
    monkeypatch.setattr(opengl, "find_backend", lambda: ("egl", "NVIDIA H200"))
    assert opengl.choose("auto") == ("opengl", "NVIDIA H200")


def test_the_viewer_has_every_body_where_it_is():
    env, drawing, episode = hopper_episode(angle=0.3, x=7.0)
    text = drawing.viewer("</script><b>", episode, env.step_seconds)
    parsed = Page(text)
    assert parsed.loads == [] and "b" not in parsed.tags and not re.search(r"https?://", text)
    data = json.loads(re.search(r'id="scene">(.*?)</script>', text).group(1))
    scene = bodies.Scene(bodies.simulation_of(env), episode.view)
    scene.go_to(1)
    place = np.frombuffer(base64.b64decode(data["place"]), "<f4").reshape(4, len(scene.shapes), 3)
    turn = np.frombuffer(base64.b64decode(data["turn"]), "<f4").reshape(4, len(scene.shapes), 4)
    np.testing.assert_allclose(place[1], scene.data.geom_xpos[scene.shapes], atol=1e-5)
    turned = np.stack([bodies._matrix(quaternion) for quaternion in turn[1]])
    np.testing.assert_allclose(turned.reshape(-1, 9), scene.data.geom_xmat[scene.shapes], atol=1e-5)
    assert [shape["kind"] for shape in data["shapes"]] == ["capsule"] * 4
    assert data["step"] == [0, 1, 2, 3] and data["return"] == [0, 1, 2, 3] and data["floor"] == 0
    assert data["seconds"] == pytest.approx(0.008)
