"use strict";
const PERIOD = 5000;
async function renew() {
  const shown = document.querySelector("main");
  try {
    const answer = await fetch(location.origin + location.pathname, { cache: "no-store", redirect: "error" });
    if (!answer.ok) throw new Error(answer.status);
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.title = next.title;
    shown.replaceChildren(...next.querySelector("main").childNodes);
  } catch {
    if (!shown.querySelector(".stale")) {
      const note = document.createElement("p");
      note.className = "stale";
      note.setAttribute("role", "status");
      note.textContent = "The server does not answer since " + new Date().toLocaleTimeString() + ".";
      shown.querySelector("header").after(note);
    }
  }
}
setInterval(() => { if (!document.hidden) renew(); }, PERIOD);
document.addEventListener("visibilitychange", () => { if (!document.hidden) renew(); });
