// Starts the page: theme, health, key, playground, live view.

import { getJson, onRefused, useKey } from "./api.js";
import { startChat } from "./chat.js";
import { startLive } from "./live.js";

const by = (id) => document.getElementById(id);
const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  by("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("llmopt-theme", theme);
}

function startTheme() {
  const kept = localStorage.getItem("llmopt-theme");
  setTheme(THEMES.includes(kept) ? kept : "auto");
  by("theme").addEventListener("click", () => {
    const now = THEMES.indexOf(document.documentElement.dataset.theme || "auto");
    setTheme(THEMES[(now + 1) % THEMES.length]);
  });
}

async function showModel() {
  try {
    const [card] = (await getJson("v1/models")).data;
    by("model").textContent = `${card.id}, context ${card.max_model_len}`;
    document.title = `${card.id} · llmopt`;
  } catch (error) {
    by("model").textContent = error.message;
  }
}

function startKey() {
  onRefused(() => {
    by("key-form").hidden = false;
  });
  by("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(by("key").value.trim());
    by("key").value = "";
    by("key-form").hidden = true;
    showModel();
  });
}

startTheme();
startKey();
startChat();
startLive();
showModel();
