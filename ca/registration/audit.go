package registration

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"sync"
)

// auditWriter writes the audit log's lines, one Write each, and remembers those that were lost.
type auditWriter struct {
	w io.Writer

	writing sync.Mutex // orders lines
	torn    bool       // the last line was written in part: the next one begins on a line of its own

	mu    sync.Mutex // for what follows; never held while a write may hang
	lost  int        // lines since the log last worked
	fresh int        // those of them that takeFailures did not report yet
	fault error      // why the last of them was lost; nil when none is
}

// Write writes a line.
func (a *auditWriter) Write(line []byte) (int, error) {
	n, err := a.write(line)
	if err != nil {
		a.mu.Lock()
		a.lost++
		a.fresh++
		a.fault = err
		a.mu.Unlock()
	}
	return n, err
}

func (a *auditWriter) write(line []byte) (int, error) {
	a.writing.Lock()
	defer a.writing.Unlock()
	if a.torn {
		if _, err := a.w.Write([]byte{'\n'}); err != nil {
			return 0, err
		}
		a.torn = false
	}
	n, err := a.w.Write(line)
	a.torn = err != nil && n > 0
	return n, err
}

func (a *auditWriter) takeFailures() (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.fresh
	a.fresh = 0
	return n, a.fault
}

// state is how many lines were lost since the log last worked, and why the last of them was.
func (a *auditWriter) state() (lost int, fault error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lost, a.fault
}

// restored takes lines that were lost for told. The fault is over if none was lost since.
func (a *auditWriter) restored(told int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.lost -= told; a.lost == 0 {
		a.fault = nil
	}
}

// Restore tries, while lines are lost, to write one that says how many; nothing else ends the fault. It is to be called
// every few seconds: an unready CA may get no request, and then no decision's line would show that there is room again.
func (j *Journal) Restore() {
	lost, _ := j.out.state()
	if lost == 0 {
		return
	}
	var line bytes.Buffer
	slog.New(slog.NewJSONHandler(&line, nil)).Warn("audit-restored", "linesLost", lost)
	if _, err := j.out.write(line.Bytes()); err != nil {
		return // it is known, and Ready says so
	}
	j.out.restored(lost)
	j.log.Info("audit lines can be written again", "lost", lost)
}

// Ready says that audit lines are being lost; nil when not.
func (j *Journal) Ready() error {
	if lost, fault := j.out.state(); lost > 0 {
		return fmt.Errorf("audit lines cannot be written (%d are lost): %w", lost, fault)
	}
	return nil
}

// countFailures makes a log that cannot be written visible: slog drops Write's error.
func (j *Journal) countFailures() {
	if n, err := j.out.takeFailures(); n > 0 {
		j.metrics.auditErrors.Add(float64(n))
		j.log.Error("audit lines could not be written", "lines", n, "err", err)
	}
}
