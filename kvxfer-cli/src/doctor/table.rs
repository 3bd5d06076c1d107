//! The report for people.

use std::fmt::Write;

use super::Report;
use super::finding::State;
use super::gpu::{Gpu, LinkKind};

/// The report as lines of text.
pub(super) fn render(report: &Report, colour: bool) -> String {
    let mut page = Page { text: format!("kvxfer {} doctor\n", report.kvxfer), colour };
    let width = report
        .findings
        .iter()
        .map(|finding| finding.name.chars().count())
        .chain(report.paths.iter().map(|verdict| verdict.path.as_str().len()))
        .max()
        .unwrap_or(0);
    let mut area = None;
    for finding in &report.findings {
        if area != Some(finding.area) {
            if area == Some(super::Area::Gpu) {
                page.matrix(&report.gpus);
            }
            area = Some(finding.area);
            page.title(finding.area.title());
        }
        page.line(finding.state, &finding.name, width, &finding.detail, finding.fix.as_deref());
    }
    page.title("paths");
    for verdict in &report.paths {
        let required = if verdict.required { " (required)" } else { "" };
        let detail = format!("{}{required}", verdict.detail);
        page.line(verdict.state, verdict.path.as_str(), width, &detail, verdict.fix.as_deref());
    }
    page.text
}

struct Page {
    text: String,
    colour: bool,
}

impl Page {
    fn title(&mut self, title: &str) {
        let bold = self.paint("1", title);
        let _ = writeln!(self.text, "\n{bold}");
    }

    fn line(&mut self, state: State, name: &str, width: usize, detail: &str, fix: Option<&str>) {
        let (code, mark) = match state {
            State::Ok => ("32", "✓"),
            State::Warn => ("33", "!"),
            State::Refused => ("31", "✗"),
            State::Absent => ("2", "–"),
        };
        let mark = self.paint(code, mark);
        let _ = writeln!(self.text, "  {mark} {name:width$}  {detail}");
        // What is absent is nobody's fault; whoever needs it reads the fix at the path.
        if let Some(fix) = fix.filter(|_| matches!(state, State::Warn | State::Refused)) {
            let _ = writeln!(self.text, "    {:width$}  → {fix}", "");
        }
    }

    /// How each GPU, by row, reaches each other one.
    fn matrix(&mut self, gpus: &[Gpu]) {
        if gpus.len() < 2 {
            return;
        }
        let mut row = |head: String, cells: Vec<String>| {
            let cells: String = cells.iter().map(|cell| format!("{cell:>11}")).collect();
            let _ = writeln!(self.text, "    {head:>4}{cells}");
        };
        row(String::new(), gpus.iter().map(|gpu| gpu.ordinal.to_string()).collect());
        for gpu in gpus {
            let cell = |link: &super::gpu::Link| {
                let kind = match link.kind {
                    LinkKind::Same => "·",
                    LinkKind::NvLink => "NVLink",
                    LinkKind::Pcie => "PCIe",
                    LinkKind::None => "none",
                };
                link.rank.map_or(kind.to_owned(), |rank| format!("{kind} ({rank})"))
            };
            row(gpu.ordinal.to_string(), gpu.links.iter().map(cell).collect());
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        match self.colour {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }
}
