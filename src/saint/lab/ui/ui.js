"use strict";
const at = (id) => document.getElementById(id);
const form = at("form");
let facts = null;
let picture = null; // { blob, name, sample }: what is pruned
let answered = null; // { name, plan } of the answer that is shown
let against = null; // the same of the plan that others are compared with
let again = false; // something was asked for while a request ran

function say(text, bad) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", Boolean(bad));
}

function options(select, values, texts) {
  for (const [i, value] of values.entries()) select.add(new Option(texts ? texts[i] : value, value));
}

const model = () => facts.models.find((m) => m.spec === at("model").value);
const method = () => facts.methods.find((m) => m.name === at("method").value);

// only what the model can take is offered
function offer() {
  const can = (stages) => stages.some((stage) => model().stages.includes(stage));
  const chosen = at("method").value;
  at("method").replaceChildren(...[...at("method").options].slice(0, 2));
  options(at("method"), facts.methods.filter((m) => can(m.stages)).map((m) => m.name));
  at("method").value = [...at("method").options].some((o) => o.value === chosen) ? chosen : "";
  at("recipe").replaceChildren(at("recipe").options[0]);
  const fitting = facts.recipes.filter((r) => r.stages.every((stage) => model().stages.includes(stage)));
  options(at("recipe"), fitting.map((r) => r.name), fitting.map((r) => `${r.name}: ${r.about}`));
  at("asking").hidden = !model().asked;
  const sample = facts.samples.find((s) => s.question);
  if (model().asked && sample && (!picture || picture.sample)) return show(sample);
  return Promise.resolve();
}

function fit() {
  const chosen = method();
  const stages = chosen ? chosen.stages.filter((stage) => model().stages.includes(stage)) : [];
  const before = at("stage").value;
  at("stage").replaceChildren();
  options(at("stage"), stages);
  if (stages.includes(before)) at("stage").value = before;
  document.querySelectorAll(".set").forEach((field) => (field.hidden = !chosen));
  if (chosen) {
    at("by-threshold").hidden = !chosen.threshold;
    at("by-tokens").hidden = !chosen.tokens;
    at("by-layers").hidden = at("stage").value === "connector";
  }
  const elsewhere = at("plan").value.trim() ? "the plan below decides" : at("method").value ? "the method below decides" : "";
  at("keep").disabled = Boolean(elsewhere);
  at("share").textContent = elsewhere ? "" : `${Math.round(100 * at("keep").value)} %`;
  at("decides").textContent = elsewhere || "share of the work that is kept; the rest is dropped where it costs least";
}

function take(blob, name, sample) {
  if (!blob) return;
  if (blob.size > facts.largest) {
    say(`at most ${facts.largest / 1e6} MB of an image are taken, ${name} has ${(blob.size / 1e6).toFixed(1)} MB: scale it down`, true);
    return;
  }
  picture = { blob, name, sample };
  say("");
  at("hint").textContent = sample ? `${name}: a sample. Drop your own here, or choose it` : name;
  for (const button of at("samples").children) button.setAttribute("aria-pressed", String(button.title === sample));
  const preview = at("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.onerror = () => (preview.hidden = true);
  preview.src = URL.createObjectURL(blob);
  preview.hidden = false;
}

async function show(sample) {
  const response = await fetch(`/sample/${encodeURIComponent(sample.name)}`);
  if (!response.ok) return;
  take(await response.blob(), sample.name, sample.name);
  if (sample.question) at("question").value = sample.question;
}

function base64(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(new Error("the file could not be read"));
    reader.readAsDataURL(blob);
  });
}

// a plan that was laid out over many lines is sent without them
function compact(text) {
  try {
    return JSON.stringify(JSON.parse(text));
  } catch {
    return text;
  }
}

async function wanted() {
  const asked = { image: await base64(picture.blob), name: picture.name, model: at("model").value };
  const fields = ["question", "stage", "threshold", "tokens", "layers"];
  if (at("method").value !== "own") fields.push("method");
  if (!at("keep").disabled) fields.push("keep");
  for (const field of fields) {
    const input = at(field);
    const value = input.value.trim();
    if (value && !input.closest("[hidden]")) asked[field] = value;
  }
  const plan = compact(at("plan").value.trim());
  if (plan.length > facts.longest) throw new Error(`a plan has at most ${facts.longest} characters, this one ${plan.length}`);
  if (plan) asked.plan = plan;
  if (against) Object.assign(asked, { against: JSON.stringify(against.plan), against_name: against.name });
  return asked;
}

async function run(event) {
  if (event) event.preventDefault();
  if (at("go").disabled) {
    again = true;
    return;
  }
  if (!picture) {
    say("choose an image first", true);
    return;
  }
  at("go").disabled = true;
  at("answer").classList.add("old");
  say("running: the first picture of a model also loads it ...");
  try {
    const body = JSON.stringify(await wanted());
    const response = await fetch("/run", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const told = await response.json().catch(() => ({ error: `the server answered ${response.status} without a word` }));
    if (!response.ok) throw new Error(told.error);
    at("answer").innerHTML = told.html; // made by this server, which escapes all text in it
    window.saintActivate(at("answer"));
    copies();
    answered = { name: told.name, plan: told.plan };
    at("pin").hidden = false;
    at("answer").classList.remove("old");
    say("");
  } catch (error) {
    say(error.message, true);
  } finally {
    at("go").disabled = false;
  }
  if (again) {
    again = false;
    await run();
  }
}

function copies() {
  if (!navigator.clipboard) return;
  for (const line of at("answer").querySelectorAll("pre.line")) {
    const text = line.textContent;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    });
    line.append(button);
  }
}

function pin(plan) {
  against = plan;
  at("pinned").hidden = !plan;
  at("against").textContent = plan ? `compared with “${plan.name}”: choose another and prune` : "";
}

function listen() {
  at("model").addEventListener("change", () => offer().then(fit));
  for (const id of ["method", "stage"]) at(id).addEventListener("change", fit);
  at("plan").addEventListener("input", fit);
  at("keep").addEventListener("input", fit);
  at("keep").addEventListener("change", () => answered && run());
  at("recipe").addEventListener("change", () => {
    at("plan").value = at("recipe").value;
    fit();
  });
  at("planfile").addEventListener("change", async () => {
    const file = at("planfile").files[0];
    if (file) at("plan").value = await file.text();
    fit();
  });
  at("pin").addEventListener("click", () => pin(answered));
  at("unpin").addEventListener("click", () => pin(null));
  at("file").addEventListener("change", () => take(at("file").files[0], at("file").files[0]?.name));
  const drop = at("drop");
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files[0], event.dataTransfer.files[0]?.name);
    });
  }
  form.addEventListener("submit", run);
}

function thumbnails() {
  for (const sample of facts.samples) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = sample.name;
    const image = new Image();
    image.src = `/sample/${encodeURIComponent(sample.name)}`;
    image.alt = sample.name;
    button.append(image);
    button.addEventListener("click", () => show(sample).then(() => run()));
    at("samples").append(button);
  }
  at("samples").hidden = !facts.samples.length;
}

async function start() {
  facts = await (await fetch("/facts")).json();
  options(at("model"), facts.models.map((m) => m.spec));
  thumbnails();
  await offer();
  if (!picture && facts.samples.length) await show(facts.samples[0]);
  fit();
  listen();
  document.body.dataset.ready = "yes";
  if (picture) await run();
}
start().catch((error) => say(`the page could not start: ${error.message}`, true));
