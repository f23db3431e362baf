//! The plan for people.

use super::{Chosen, Model, Network, Plan, Session};
use bytesize::ByteSize;
use std::fmt::{Result, Write};

/// Of the column of names.
const NAMES: usize = 40;

impl Plan {
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> Result {
        let Model { name, family, layers, split_point_1, split_point_2, dtype, device } =
            &self.model;
        writeln!(
            out,
            "{name} ({family}, {layers} layers): the trunk is layers {split_point_1} to \
             {split_point_2}, {dtype} on {device}"
        )?;
        self.write_budget(out)?;
        self.write_session(out)?;
        self.write_most(out)?;
        self.write_chosen(out)?;
        self.write_network(out)?;
        self.write_time(out)?;
        self.write_limits(out)
    }

    /// There idle sessions have the host's memory before the disk.
    fn is_accelerator(&self) -> bool {
        self.model.device != "cpu"
    }

    fn write_budget(&self, out: &mut String) -> Result {
        let budget = self.memory.budget_bytes;
        write!(out, "limits.memory_bytes = {budget} ({})", size(budget))?;
        match self.memory.gpu_bytes {
            Some(gpu) => writeln!(
                out,
                ": {} less {} for what the ledger does not count",
                size(gpu),
                size(gpu.saturating_sub(budget))
            ),
            None => writeln!(out),
        }
    }

    fn write_session(&self, out: &mut String) -> Result {
        let s = &self.session;
        let Session { lora_rank, tokens_per_microbatch: tokens, .. } = s;
        let targets = match s.target_modules.as_slice() {
            [] => "all linear layers".into(),
            targets => targets.join(", "),
        };
        writeln!(
            out,
            "\nOne session: rank {lora_rank} on {targets}, {} trained values in the trunk",
            s.parameters
        )?;
        row(out, "adapter, gradients, optimizer", &size(s.adapter_bytes))?;
        if self.is_accelerator() {
            row(out, "  idle in the host's memory", &size(s.adapter_bytes))?;
        }
        row(out, "  snapshots on disk, at most", &size(s.most_disk_bytes))?;
        writeln!(out, "  an open microbatch of {tokens} tokens keeps")?;
        row(out, "  all that its backward needs", &size(s.full_tape_bytes))?;
        row(out, "  or each layer's input", &size(s.block_tape_bytes))?;
        row(out, "  or the trunk's input", &size(s.input_tape_bytes))?;
        row(out, "workspace while one runs", &size(s.workspace_bytes))?;
        row(out, "cache, for each token generated", &size(s.cache_bytes_per_token))
    }

    fn write_most(&self, out: &mut String) -> Result {
        let (most, n_open) = (&self.most, self.session.microbatches_in_flight);
        let n_open = n_open.min(self.session.microbatches);
        let each = match n_open {
            1 => "with a microbatch open each".to_string(),
            n => format!("with {n} microbatches open each"),
        };
        writeln!(out, "\nSessions that fit")?;
        row(out, "at once, at full speed", &format!("{}   {each}", most.full_tapes))?;
        let again = "layers run again in the backward";
        row(out, "at once, keeping layers' inputs", &format!("{}   {again}", most.block_tapes))?;
        let again = "the forward runs again";
        row(out, "at once, keeping the trunk's input", &format!("{}   {again}", most.input_tapes))?;
        let wait = "microbatches wait for one another";
        row(out, "adapters on the device", &format!("{}   {wait}", most.on_device))?;
        if let Some(n) = most.in_host_memory {
            row(out, "idle beside them in host memory", &n.to_string())?;
        }
        row(out, "live, the others on disk", &format!("{}   limits.max_live_sessions", most.live))
    }

    fn write_chosen(&self, out: &mut String) -> Result {
        let Chosen { sessions, on_device, tapes, open_microbatches, bytes, free_bytes } =
            &self.chosen;
        writeln!(out, "\n{sessions} sessions that train at the same time")?;
        row(out, "weights of the trunk", &size(bytes.weights))?;
        row(out, "adapters", &format!("{}   of {on_device} sessions", size(bytes.adapters)))?;
        let kept = match tapes {
            Some("full") => "full",
            Some("blocks") => "layers' inputs",
            _ => "the trunk's inputs",
        };
        let open = format!("{}   {open_microbatches} open, {kept}", size(bytes.tapes));
        row(out, "tapes", &open)?;
        row(out, "workspace", &format!("{}   larger batches take more", size(bytes.workspace)))?;
        row(out, "free", &size(*free_bytes))?;
        if *tapes != Some("full") {
            writeln!(out, "  The server keeps larger tapes for those that there is room for.")?;
        }
        if on_device < sessions {
            let place = match self.is_accelerator() {
                true => "in the host's memory or on disk",
                false => "on disk",
            };
            let n_away = sessions - on_device;
            writeln!(out, "  {n_away} of them wait {place} for their turn (session.turn_seconds)")?;
        }
        Ok(())
    }

    fn write_network(&self, out: &mut String) -> Result {
        let Network { wire_dtype, tokens_per_step, up_bytes_per_step, down_bytes_per_step, .. } =
            &self.network;
        writeln!(
            out,
            "\nNetwork of one client: {tokens_per_step} tokens in a step, in {wire_dtype}"
        )?;
        let line = |bytes: u64, rate: Option<f64>| match rate {
            Some(rate) => format!("{} a step   {rate:.1} Mbit/s", size(bytes)),
            None => format!(
                "{} a step   {:.1} Mbit/s at a step a second",
                size(bytes),
                bytes as f64 * 8.0 / 1e6
            ),
        };
        row(out, "up", &line(*up_bytes_per_step, self.network.up_mbit_per_second))?;
        row(out, "down", &line(*down_bytes_per_step, self.network.down_mbit_per_second))
    }

    fn write_time(&self, out: &mut String) -> Result {
        let Some(time) = &self.time else { return Ok(()) };
        let m = &time.measured;
        writeln!(
            out,
            "\nTime of the trunk's part of a step, measured on this machine's {}",
            m.device
        )?;
        let line = |seconds: f64, speed: f64| format!("{seconds:.3} s   {speed:.0} tokens/s");
        row(out, "a session alone", &line(m.alone_step_seconds, m.alone_tokens_per_second))?;
        let together = format!("{:.0} tokens/s in all", m.together_tokens_per_second);
        row(out, &format!("{} sessions at a time", m.together_sessions), &together)?;
        let all = format!("each of {}, expected", self.chosen.sessions);
        row(out, &all, &format!("{:.3} s   without network and client", time.step_seconds))
    }

    fn write_limits(&self, out: &mut String) -> Result {
        let sessions = self.chosen.sessions;
        writeln!(out)?;
        match self.first_limit {
            Some("weights") => writeln!(
                out,
                "The trunk's weights do not fit: hold fewer layers, take --dtype bf16, or more memory."
            )?,
            Some(limit) => writeln!(
                out,
                "What limits first: {limit}. Session {} finds no room for them at full speed.",
                self.most.full_tapes + 1
            )?,
            None => {}
        }
        if self.most.full_tapes < sessions {
            writeln!(out, "For {sessions} sessions at full speed, any one of:")?;
            let needed = self.needed_budget_bytes;
            writeln!(out, "  limits.memory_bytes = {needed} ({})", size(needed))?;
            for change in &self.changes {
                writeln!(out, "  {change}")?;
            }
        }
        if !self.settings.is_empty() {
            writeln!(out, "Settings of the server for this: {}", self.settings.join(", "))?;
        }
        Ok(())
    }
}

fn row(out: &mut String, name: &str, value: &str) -> Result {
    // Numbers end in one column, what is said of them begins in another.
    let (number, more) = value.split_once("   ").unwrap_or((value, ""));
    let line = format!("  {name:<NAMES$}{number:>12}   {more}");
    writeln!(out, "{}", line.trim_end())
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}
