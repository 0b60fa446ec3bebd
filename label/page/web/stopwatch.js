// The time that a person spends on one item: it stands still while the page is hidden, and ends at a day.

const DAY = 86_400;

export class Stopwatch {
  constructor() {
    this.reset();
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.pause();
      else this.since = performance.now();
    });
  }

  reset(seconds = 0) {
    this.kept = seconds;
    this.since = document.hidden ? null : performance.now();
  }

  pause() {
    this.kept = this.seconds();
    this.since = null;
  }

  seconds() {
    return Math.min(DAY, this.kept + (this.since === null ? 0 : (performance.now() - this.since) / 1000));
  }
}

export function clockTime(seconds) {
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
