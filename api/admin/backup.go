package admin

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

const (
	// chunkSize is what one message of a backup holds, in bytes.
	chunkSize = 256 << 10
	// maxBackupTime bounds how long a backup may take, and with it how long one waits on the CA's disk for a slow client.
	maxBackupTime = 15 * time.Minute
)

// Snapshot is a backup that waits to be read. Reading it slowly costs the store nothing.
type Snapshot struct {
	io.ReadCloser
	Summary *meshcav1.BackupSummary
}

// Continuity is whether the store is the one that agents have followed.
type Continuity interface {
	// Loss is what is known to be lost and was not accepted; nil: nothing.
	Loss() *ca.Loss
	// Accept goes on from the store as it is, with a bundle whose sequence is greater than all that was seen and than above.
	Accept(ctx context.Context, above uint64) (sequence uint64, err error)
}

// Backup streams a backup, and then what it is. One at a time: each takes as much of the CA's disk as the store.
func (s *Server) Backup(_ *meshcav1.BackupRequest, stream grpc.ServerStreamingServer[meshcav1.BackupResponse]) error {
	select {
	case s.backingUp <- struct{}{}:
		defer func() { <-s.backingUp }()
	default:
		return refusal.New(refusal.Overloaded, "another backup is being taken").After(10 * time.Second)
	}
	ctx, cancel := context.WithTimeoutCause(stream.Context(), s.backupTime, errSlow)
	defer cancel()
	summary, err := s.backup(ctx, stream)
	s.audit(ctx, "backup", peerName(ctx), err, slog.Uint64("bytes", summary.GetBytes()), slog.String("sha256", summary.GetSha256()),
		slog.Uint64("state", summary.GetState()), slog.Uint64("ledgerLast", summary.GetLedgerLast()))
	return err
}

var errSlow = errors.New("the backup was not taken in time")

func (s *Server) backup(ctx context.Context, stream grpc.ServerStreamingServer[meshcav1.BackupResponse]) (*meshcav1.BackupSummary, error) {
	snapshot, err := s.c.Backup(ctx)
	if err != nil {
		return nil, err
	}
	defer snapshot.Close()
	for buf := make([]byte, chunkSize); ; {
		n, err := io.ReadFull(snapshot, buf)
		if n > 0 {
			if err := send(ctx, stream, &meshcav1.BackupResponse{Part: &meshcav1.BackupResponse_Chunk{Chunk: buf[:n]}}); err != nil {
				return snapshot.Summary, err
			}
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return snapshot.Summary, send(ctx, stream, &meshcav1.BackupResponse{Part: &meshcav1.BackupResponse_Summary{Summary: snapshot.Summary}})
		case err != nil:
			return snapshot.Summary, err
		}
	}
}

// send waits for the client until ctx ends. A Send that is left behind ends with the stream, which ends when its handler
// returns; buf is not used again then.
func send(ctx context.Context, stream grpc.ServerStreamingServer[meshcav1.BackupResponse], m *meshcav1.BackupResponse) error {
	sent := make(chan error, 1)
	go func() { sent <- stream.Send(m) }()
	select {
	case err := <-sent:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// AcceptRollback has the CA go on from an old store.
func (s *Server) AcceptRollback(ctx context.Context, r *meshcav1.AcceptRollbackRequest) (*meshcav1.AcceptRollbackResponse, error) {
	var seen ca.Mark
	if l := s.c.Continuity.Loss(); l != nil {
		seen = l.Mark
	}
	sequence, err := s.c.Continuity.Accept(ctx, r.GetAbove())
	s.audit(ctx, "ca accept-rollback", peerName(ctx), err, slog.Uint64("seenState", seen.Generation), slog.Uint64("seenBundleSequence", seen.Bundle),
		slog.Uint64("above", r.GetAbove()), slog.Uint64("bundleSequence", sequence))
	if err != nil {
		return nil, err
	}
	return &meshcav1.AcceptRollbackResponse{BundleSequence: sequence}, nil
}

// rollback is the status of a loss; nil where there is none.
func rollback(l *ca.Loss) *meshcav1.RollbackStatus {
	if l == nil {
		return nil
	}
	return &meshcav1.RollbackStatus{
		Agent: l.Agent, Since: timestamppb.New(l.Since), SeenState: l.Mark.Generation, SeenBundleSequence: l.Mark.Bundle,
	}
}
