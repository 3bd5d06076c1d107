//! GB/s over block size, as an SVG picture.

use std::collections::BTreeMap;

use kvxfer_core::{ErrorKind, Result};
use plotters::prelude::*;

use super::report::{Report, size};

/// A line for each path: of the pushes with the most blocks.
pub(super) fn svg(report: &Report) -> Result<String> {
    let most = report.rows.iter().filter_map(|row| row.figures.as_ref().and(row.blocks)).max();
    let Some(most) = most else {
        return Err(ErrorKind::NotFound.error("nothing was measured, so there is nothing to plot"));
    };
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for row in report.rows.iter().filter(|row| row.blocks == Some(most)) {
        if let (Some(figures), Some(bytes)) = (&row.figures, row.block_bytes) {
            lines.entry(&row.path).or_default().push((bytes.into(), figures.push.gbps));
        }
    }
    let mut text = String::new();
    let title = format!("push, GB/s over bytes of a block; {most} blocks a request");
    draw(&mut text, &title, &lines)
        .map_err(|error| ErrorKind::Io.error(format!("the plot can't be drawn: {error}")))?;
    Ok(text)
}

fn draw(
    text: &mut String,
    title: &str,
    lines: &BTreeMap<&str, Vec<(f64, f64)>>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let points = || lines.values().flatten();
    let edge = |pick: fn(f64, f64) -> f64| points().map(|(bytes, _)| *bytes).reduce(pick);
    let (least, most) = (edge(f64::min).unwrap_or(1.0), edge(f64::max).unwrap_or(1.0));
    let top = points().map(|(_, gbps)| *gbps).fold(0.0, f64::max) * 1.1;
    let area = SVGBackend::with_string(text, (800, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(52)
        .y_label_area_size(64)
        .build_cartesian_2d((least / 1.2..most * 1.2).log_scale().base(2.0), 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 18))
        .x_labels(12)
        .x_label_formatter(&|bytes| size(*bytes as u64))
        .x_desc("bytes of a block in one layer")
        .y_desc("GB/s")
        .draw()?;
    for (index, (path, points)) in lines.iter().enumerate() {
        let colour = Palette99::pick(index);
        chart
            .draw_series(
                LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3),
            )?
            .label(*path)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .label_font(("sans-serif", 18))
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}
