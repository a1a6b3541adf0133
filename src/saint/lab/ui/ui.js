"use strict";
const at = (id) => document.getElementById(id);
const form = at("form");
let facts = null;
let file = null;

function say(text, bad) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", Boolean(bad));
}

function options(select, values, texts) {
  for (const [i, value] of values.entries()) select.add(new Option(texts ? texts[i] : value, value));
}

function fit() {
  const model = facts.models.find((m) => m.spec === at("model").value);
  at("asking").hidden = !model.asked;
  const chosen = facts.methods.find((m) => m.name === at("method").value);
  const stages = chosen ? chosen.stages.filter((stage) => model.asked || stage === "vision") : [];
  const before = at("stage").value;
  at("stage").replaceChildren();
  options(at("stage"), stages);
  if (stages.includes(before)) at("stage").value = before;
  document.querySelectorAll(".set").forEach((field) => (field.hidden = !chosen));
  if (chosen) {
    at("by-threshold").hidden = !chosen.threshold;
    at("by-keep").hidden = !chosen.keep;
    at("by-layers").hidden = at("stage").value === "connector";
  }
}

function take(list) {
  const chosen = list && list[0];
  if (!chosen) return;
  if (chosen.size > facts.largest) {
    say(`at most ${facts.largest / 1e6} MB of an image are taken, ${chosen.name} has ${(chosen.size / 1e6).toFixed(1)} MB: scale it down`, true);
    return;
  }
  file = chosen;
  say("");
  at("hint").textContent = chosen.name;
  const preview = at("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.onerror = () => (preview.hidden = true);
  preview.src = URL.createObjectURL(chosen);
  preview.hidden = false;
}

function base64(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(new Error("the file could not be read"));
    reader.readAsDataURL(blob);
  });
}

async function run(event) {
  event.preventDefault();
  if (!file) {
    say("choose an image first", true);
    return;
  }
  const asked = { image: await base64(file), name: file.name };
  for (const field of ["model", "question", "plan", "method", "stage", "threshold", "keep", "layers"]) {
    const input = at(field);
    const value = input.value.trim();
    if (value && !input.closest("[hidden]")) asked[field] = value;
  }
  at("go").disabled = true;
  at("answer").classList.add("old");
  say("running: the first picture of a model also loads it ...");
  try {
    const response = await fetch("/run", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
    });
    const told = await response.json().catch(() => ({ error: `the server answered ${response.status} without a word` }));
    if (!response.ok) throw new Error(told.error);
    at("answer").innerHTML = told.html; // made by this server, which escapes all text in it
    window.saintActivate(at("answer"));
    at("answer").classList.remove("old");
    say("");
  } catch (error) {
    say(error.message, true);
  } finally {
    at("go").disabled = false;
  }
}

async function start() {
  facts = await (await fetch("/facts")).json();
  options(at("model"), facts.models.map((m) => m.spec));
  options(at("method"), facts.methods.map((m) => m.name));
  for (const name of Object.keys(facts.recipes)) at("recipes").append(new Option(facts.recipes[name], name));
  fit();
  for (const id of ["model", "method", "stage"]) at(id).addEventListener("change", fit);
  at("file").addEventListener("change", () => take(at("file").files));
  const drop = at("drop");
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
  form.addEventListener("submit", run);
  document.body.dataset.ready = "yes";
}
start().catch((error) => say(`the page could not start: ${error.message}`, true));
