package admin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

// history has lost something, or not.
type history struct {
	mu     sync.Mutex
	loss   *ca.Loss
	above  uint64
	broken error
}

func (h *history) Loss() *ca.Loss { h.mu.Lock(); defer h.mu.Unlock(); return h.loss }

func (h *history) Accept(_ context.Context, above uint64) (uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.broken != nil {
		return 0, h.broken
	}
	h.loss, h.above = nil, above
	return 1009, nil
}

// closing counts how many of its snapshots are open.
type closing struct {
	io.Reader
	open *sync.WaitGroup
}

func (c closing) Close() error { c.open.Done(); return nil }

// snapshots are of this content, and can be waited for until all are closed.
func (f *fixture) snapshots(content string, fault error) *sync.WaitGroup {
	var open sync.WaitGroup
	f.snapshot = func(context.Context) (Snapshot, error) {
		open.Add(1)
		var r io.Reader = strings.NewReader(content)
		if fault != nil {
			r = io.MultiReader(r, failing{fault})
		}
		return Snapshot{closing{r, &open}, &meshcav1.BackupSummary{Bytes: uint64(len(content)), Sha256: "ab", State: 7}}, nil
	}
	return &open
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func receive(stream grpc.ServerStreamingClient[meshcav1.BackupResponse]) (data []byte, summary *meshcav1.BackupSummary, err error) {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return data, summary, nil
		}
		if err != nil {
			return data, summary, err
		}
		data = append(data, m.GetChunk()...)
		summary = m.GetSummary()
	}
}

func TestABackupIsStreamed(t *testing.T) {
	f := start(t, "rules: []")
	for _, size := range []int{0, 1, chunkSize, 3*chunkSize + 1} {
		content := strings.Repeat("x", size)
		open := f.snapshots(content, nil)
		stream, err := f.CA.Backup(t.Context(), &meshcav1.BackupRequest{})
		if err != nil {
			t.Fatal(err)
		}
		data, summary, err := receive(stream)
		if err != nil || !bytes.Equal(data, []byte(content)) || summary.GetBytes() != uint64(size) {
			t.Errorf("%d bytes, %v, %v; want %d", len(data), summary, err, size)
		}
		open.Wait()
	}
	if lines := f.audited(); strings.Count(lines, "outcome=done") != 4 || !strings.Contains(lines, "backup uid ") || !strings.Contains(lines, "sha256=ab state=7") {
		t.Errorf("the audit log has\n%s", lines)
	}
}

// A disk that fails half-way leaves no summary, and its line.
func TestABackupThatFails(t *testing.T) {
	f := start(t, "rules: []")
	open := f.snapshots("half", errors.New("the disk is gone"))
	stream, err := f.CA.Backup(t.Context(), &meshcav1.BackupRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, summary, err := receive(stream); err == nil || !strings.Contains(err.Error(), "the disk is gone") || summary != nil {
		t.Errorf("got %v, %v", summary, err)
	}
	open.Wait()
	if lines := f.audited(); !strings.Contains(lines, "message=the disk is gone") {
		t.Errorf("the audit log has\n%s", lines)
	}
}

// Whoever reads slowly, or not at all, loses the backup after its time, and others get theirs then. Two at a time there
// are none.
func TestASlowReaderIsLeft(t *testing.T) {
	f := start(t, "rules: []")
	f.backupTime = 2 * time.Second
	f.serve(t)
	open := f.snapshots(strings.Repeat("x", 64*chunkSize), nil) // more than gRPC sends ahead
	slow, err := f.CA.Backup(t.Context(), &meshcav1.BackupRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := slow.Recv(); err != nil {
		t.Fatal(err)
	}
	second, err := f.CA.Backup(t.Context(), &meshcav1.BackupRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = receive(second)
	wantReason(t, err, refusal.Overloaded)
	open.Wait() // nobody has read on
	if _, summary, err := receive(slow); err == nil || summary != nil {
		t.Errorf("the slow one got %v, %v", summary, err)
	}
	open = f.snapshots("x", nil)
	third, err := f.CA.Backup(t.Context(), &meshcav1.BackupRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, summary, err := receive(third); err != nil || summary == nil {
		t.Errorf("the next one got %v, %v", summary, err)
	}
	open.Wait()
	if lines := f.audited(); !strings.Contains(lines, errSlow.Error()) {
		t.Errorf("the audit log has\n%s", lines)
	}
}

func TestARollbackIsShownAndAccepted(t *testing.T) {
	f := start(t, "rules: []")
	status, err := f.CA.GetStatus(t.Context(), &meshcav1.GetStatusRequest{})
	if err != nil || status.GetRollback() != nil {
		t.Errorf("nothing is lost: %v, %v", status.GetRollback(), err)
	}
	since := time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
	f.history.loss = &ca.Loss{Mark: ca.Mark{Generation: 41, Bundle: 9}, Agent: "spiffe://mesh.example/meshca/agent/prod/n1", Since: since}
	status, err = f.CA.GetStatus(t.Context(), &meshcav1.GetStatusRequest{})
	if r := status.GetRollback(); err != nil || r.GetSeenState() != 41 || r.GetSeenBundleSequence() != 9 || !r.GetSince().AsTime().Equal(since) {
		t.Errorf("%v, %v", r, err)
	}
	check, err := f.CA.Check(t.Context(), &meshcav1.CheckRequest{})
	if err != nil || !strings.Contains(check.String(), "agent/prod/n1 has followed state 41") || !strings.Contains(check.String(), "certctl ca accept-rollback") {
		t.Errorf("%v, %v", check, err)
	}
	f.history.broken = errors.New("the disk is full")
	if _, err := f.CA.AcceptRollback(t.Context(), &meshcav1.AcceptRollbackRequest{}); err == nil || f.history.Loss() == nil {
		t.Errorf("got %v", err)
	}
	f.history.broken = nil
	r, err := f.CA.AcceptRollback(t.Context(), &meshcav1.AcceptRollbackRequest{Above: 77})
	if err != nil || r.GetBundleSequence() != 1009 || f.history.above != 77 || f.history.Loss() != nil {
		t.Errorf("%v, %v", r, err)
	}
	lines := f.audited()
	for _, want := range []string{"message=the disk is full", "seenState=41 seenBundleSequence=9 above=77 bundleSequence=1009 outcome=done"} {
		if !strings.Contains(lines, want) {
			t.Errorf("the audit log lacks %q:\n%s", want, lines)
		}
	}
}
