"use strict";
// Shows one group of images after the other, and sends the votes. Prompts are text, never markup.

const SMALL = 128; // images with fewer pixels per side are enlarged pixel by pixel
const PAUSE = 2000; // milliseconds between questions for something to vote on
const [prompt, hint, progress, bar, images, mode, skip, send, keys, zoom] =
  ["prompt", "hint", "progress", "bar", "images", "mode", "skip", "send", "keys", "zoom"]
    .map((id) => document.getElementById(id));

// The address has the token behind "#", which a browser sends to nobody. It stays in this tab only.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}

let group = null; // { id, prompt, num_images }, or null where there is nothing to vote on
let givesStars = sessionStorage.getItem("stars") === "yes";
let best = null, worst = null, stars = [], focused = 0, isBusy = false; // busy while a vote is sent and the next images come
let notice = ""; // what became of the last vote, where it was not kept

const ask = (path, options = {}) =>
  fetch(path, { ...options, headers: { Authorization: `Bearer ${sessionStorage.getItem("token")}` } });

// ---- What comes and goes ----

async function next() {
  try {
    const answer = await ask("next");
    if (answer.status === 401) {
      return say("This page needs the address that `trl-marble vote` printed, with its token.");
    }
    const { group: found, done, total } = await answer.json();
    const files = found ? await load(found) : null;
    clear();
    progress.value = total ? `${done} of ${total} groups` : "";
    bar.value = total ? done / total : 0;
    bar.hidden = !total;
    if (files) return show(found, files);
    prompt.textContent = "Nothing to vote on";
    say("The run shows its next images here as soon as it has them.");
  } catch {
    say("The page's server does not answer. Is `trl-marble vote` running?");
  }
  setTimeout(next, PAUSE);
}

async function load(found) {
  const files = await Promise.all([...Array(found.num_images).keys()].map(async (place) => {
    const answer = await ask(`groups/${found.id}/${place}`);
    return answer.ok ? URL.createObjectURL(await answer.blob()) : null;
  }));
  return files.includes(null) ? null : files; // null if the group was withdrawn in the meantime
}

function show(found, files) {
  group = found;
  stars = files.map(() => null);
  prompt.textContent = found.prompt;
  images.append(...files.map(card));
  draw();
  focus(0);
}

function clear() {
  images.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
  images.replaceChildren();
  zoom.close();
  group = best = worst = null;
  stars = [];
  draw();
}

async function post(vote) {
  if (!group || isBusy) return;
  isBusy = true;
  notice = "";
  try {
    const answer = await ask(`groups/${group.id}`, { method: "POST", body: JSON.stringify(vote) });
    if (answer.status === 404) notice = "The run did not wait for the last vote. ";
    else if (answer.status === 409) notice = "Somebody else has voted on the last images. ";
    else if (!answer.ok) return say((await answer.json()).detail);
    await next();
  } catch {
    say("The vote is not kept: the page's server does not answer. Send it again when it runs.");
  } finally {
    isBusy = false;
  }
}

// ---- What is drawn ----

function make(name, className, text = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = text;
  return element;
}

function card(file, place) {
  const figure = make("figure", ""), picture = make("button", "picture"), image = make("img", "");
  picture.type = "button";
  picture.title = "Z enlarges";
  image.alt = `image ${place + 1}`;
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < SMALL));
  image.src = file;
  picture.append(image);
  picture.addEventListener("click", () => { focus(place); if (!givesStars) choose(place); });
  picture.addEventListener("focus", () => { focused = place; });
  const row = make("span", "stars");
  for (let number = 1; number <= 5; number++) {
    const star = make("button", "", "★");
    star.type = "button";
    star.tabIndex = -1;
    star.setAttribute("aria-label", `${number} of 5 stars for image ${place + 1}`);
    star.addEventListener("click", () => { rate(place, stars[place] === number ? null : number); focus(place); });
    row.append(star);
  }
  const caption = make("figcaption", "");
  caption.append(make("span", "number", place + 1), make("span", "mark"), row);
  figure.append(picture, caption);
  return figure;
}

function draw() {
  [...images.children].forEach((figure, place) => {
    const name = givesStars ? "" : place === best ? "best" : place === worst ? "worst" : "";
    figure.className = name;
    figure.querySelector(".mark").textContent = name;
    const row = figure.querySelector(".stars");
    row.hidden = !givesStars;
    [...row.children].forEach((star, index) => star.classList.toggle("full", index < stars[place]));
  });
  const rated = stars.filter(Boolean).length;
  mode.textContent = givesStars ? "Best and worst " : "Stars ";
  mode.append(make("kbd", "", "M"));
  skip.disabled = !group;
  send.disabled = !group || (givesStars ? !rated : best === null && worst === null);
  keys.textContent = givesStars ? "Arrows move, 1 to 5 give stars, 0 takes them away, Z enlarges"
    : "Arrows move, Space chooses, B best, W worst, Z enlarges";
  if (!group) return;
  if (givesStars) say(`${rated} of ${stars.length} images have stars. Images without stars do not count.`);
  else if (best === null) say("Choose the best image.");
  else if (worst === null) say("Choose the worst image, or send.");
  else say("Send, or choose again: a click on a chosen image frees it.");
}

const say = (text) => { hint.textContent = notice + text; };

function focus(place) {
  focused = Math.max(0, Math.min(images.children.length - 1, place));
  images.children[focused]?.querySelector(".picture").focus();
}

// ---- What a person does ----

function choose(place) {
  if (isBusy) return;
  if (place === best) best = null;
  else if (place === worst) worst = null;
  else if (best === null) best = place;
  else worst = place;
  draw();
}

function mark(place, isBest) {
  if (isBest) [best, worst] = [place, worst === place ? null : worst];
  else [best, worst] = [best === place ? null : best, place];
  draw();
}

function rate(place, number) {
  if (isBusy) return;
  stars[place] = number;
  draw();
}

function enlarge() {
  const shown = images.children[focused].querySelector("img"), large = zoom.querySelector("img");
  large.src = shown.src;
  large.className = shown.className;
  zoom.showModal();
}

function changeMode() {
  givesStars = !givesStars;
  sessionStorage.setItem("stars", givesStars ? "yes" : "no");
  draw();
  focus(focused);
}

function sendVote() {
  if (!send.disabled) post(givesStars ? { stars } : { best, worst });
}

const columns = () => getComputedStyle(images).gridTemplateColumns.split(" ").length;

const ACTIONS = {
  m: changeMode,
  s: () => post({ skip: true }),
  z: () => group && enlarge(),
  Enter: sendVote,
  ArrowLeft: () => focus(focused - 1),
  ArrowRight: () => focus(focused + 1),
  ArrowUp: () => focused >= columns() && focus(focused - columns()),
  ArrowDown: () => focused + columns() < images.children.length && focus(focused + columns()),
};

document.addEventListener("keydown", (event) => {
  if (isBusy || event.ctrlKey || event.altKey || event.metaKey) return;
  if (zoom.open) {
    if (event.key.toLowerCase() === "z") zoom.close();
    return;
  }
  // Enter on one of the buttons below presses that button.
  if (event.key === "Enter" && event.target.closest("footer")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (ACTIONS[key]) ACTIONS[key]();
  else if (group && givesStars && /^[0-5]$/.test(key)) {
    rate(focused, Number(key) || null);
    if (key !== "0") focus(focused + 1);
  } else if (group && !givesStars && (key === "b" || key === "w")) mark(focused, key === "b");
  else return;
  event.preventDefault();
});
mode.addEventListener("click", changeMode);
skip.addEventListener("click", () => post({ skip: true }));
send.addEventListener("click", sendVote);
zoom.addEventListener("click", () => zoom.close());
draw();
next();
