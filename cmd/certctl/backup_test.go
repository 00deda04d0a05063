package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/meshca/meshca/api/admin"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/ca"
)

// backupText is larger than a message.
var backupText = strings.Repeat("a backup of the store\n", 50_000)

func (f *facts) backup(context.Context) (admin.Snapshot, error) {
	sum := sha256.Sum256([]byte(backupText))
	return admin.Snapshot{ReadCloser: io.NopCloser(strings.NewReader(backupText)), Summary: &meshcav1.BackupSummary{
		Bytes: uint64(len(backupText)), Sha256: hex.EncodeToString(sum[:]), MadeAt: f.stamp(-26 * time.Hour), TrustDomain: "mesh.example", Schema: 1, State: 40,
		BundleSequence: 3, RolloutStep: "out", Denials: 2, LedgerEntries: 5678, LedgerLast: 6000, LastIssuedAt: f.stamp(-26 * time.Hour),
	}}, nil
}

// Loss and Accept are the CA's Continuity.
func (x *roots) Loss() *ca.Loss { x.mu.Lock(); defer x.mu.Unlock(); return x.loss }

func (x *roots) Accept(_ context.Context, above uint64) (uint64, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.loss == nil && above == 0 {
		return 0, errors.New("there is nothing to accept")
	}
	if x.loss != nil {
		above = max(above, x.loss.Mark.Bundle)
	}
	x.loss = nil
	return above + 1000, nil
}

// stream is what a CA sends.
type stream struct {
	grpc.ServerStreamingClient[meshcav1.BackupResponse]
	messages []*meshcav1.BackupResponse
}

func (s *stream) Recv() (*meshcav1.BackupResponse, error) {
	if len(s.messages) == 0 {
		return nil, io.EOF
	}
	m := s.messages[0]
	s.messages = s.messages[1:]
	return m, nil
}

// A backup that is cut off or changed on its way is none, whatever the CA says at the end.
func TestABackupIsWholeOrNone(t *testing.T) {
	chunk := func(s string) *meshcav1.BackupResponse {
		return &meshcav1.BackupResponse{Part: &meshcav1.BackupResponse_Chunk{Chunk: []byte(s)}}
	}
	sum := sha256.Sum256([]byte("onetwo"))
	end := &meshcav1.BackupResponse{Part: &meshcav1.BackupResponse_Summary{Summary: &meshcav1.BackupSummary{Bytes: 6, Sha256: hex.EncodeToString(sum[:])}}}
	for name, tt := range map[string]struct {
		messages []*meshcav1.BackupResponse
		code     int
	}{
		"whole":             {[]*meshcav1.BackupResponse{chunk("one"), chunk("two"), end}, exitFine},
		"without its end":   {[]*meshcav1.BackupResponse{chunk("one"), chunk("two")}, exitUnreachable},
		"nothing":           {nil, exitUnreachable},
		"a part is missing": {[]*meshcav1.BackupResponse{chunk("one"), end}, exitNo},
		"a part changed":    {[]*meshcav1.BackupResponse{chunk("one"), chunk("twO"), end}, exitNo},
	} {
		var out bytes.Buffer
		s, err := gatherBackup(&stream{messages: tt.messages}, &out, sha256.New())
		var f *failure
		code := exitFine
		if errors.As(err, &f) {
			code = f.code
		}
		if code != tt.code || (s != nil) != (tt.code == exitFine) {
			t.Errorf("%s: %v, %v; want exit code %d", name, s, err, tt.code)
		}
	}
}
