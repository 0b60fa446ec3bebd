// The colours: as the system has them, unless the person chose. A classic script in the head, so that nothing flashes.
"use strict";
(() => {
  const ORDER = ["system", "dark", "light"];
  const stored = () => (ORDER.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system");

  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const name = document.getElementById("theme-name");
    if (name) name.textContent = theme;
  };

  show(stored());
  document.addEventListener("DOMContentLoaded", () => {
    show(stored());
    document.getElementById("theme").addEventListener("click", () => {
      const next = ORDER[(ORDER.indexOf(stored()) + 1) % ORDER.length];
      localStorage.setItem("theme", next);
      show(next);
    });
  });
})();
