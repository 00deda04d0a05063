package bolt

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
)

// A backup is a file of four parts: a line that says what it is, a line of JSON (Header), the store's file as one
// transaction saw it, and the SHA-256 of all before, 32 bytes.
const (
	backupMagic    = "meshca-backup 1\n"
	maxHeaderBytes = 64 << 10
	// backupTime bounds how long a backup may read. While it does, pages of what is replaced cannot be used again, so the
	// file grows; and a commit that must enlarge the mapping of the file waits.
	backupTime = 2 * time.Minute
)

// ErrBackup is wrapped by the error for a file that is no backup, or not a whole one.
var ErrBackup = errors.New("not a whole backup")

// Header says what a backup holds.
type Header struct {
	Made        time.Time `json:"made"`
	TrustDomain string    `json:"trustDomain"`
	Schema      uint32    `json:"schema"`
	// Size is that of the store's file, in bytes.
	Size int64 `json:"size"`
	// Generation and Tag are those of the newest mark.
	Generation     uint64 `json:"generation"`
	Tag            string `json:"tag"`
	BundleSequence uint64 `json:"bundleSequence"`
	Rollout        string `json:"rollout,omitempty"`
	Denials        int    `json:"denials"`
	LedgerEntries  uint64 `json:"ledgerEntries"`
	// LedgerLast is the index of the last entry, LastIssued its time.
	LedgerLast uint64    `json:"ledgerLast"`
	LastIssued time.Time `json:"lastIssued,omitzero"`
}

// Snapshot is a backup that waits to be read, in a file that has no name: it is gone when it is closed, or when this
// process ends.
type Snapshot struct {
	Header
	// Bytes is the size of the whole, SHA256 the digest of it all, trailer included.
	Bytes  int64
	SHA256 [sha256.Size]byte

	file *os.File
}

// Read returns the backup's bytes in order.
func (s *Snapshot) Read(p []byte) (int, error) { return s.file.Read(p) }

// Close gives the disk its room back.
func (s *Snapshot) Close() error { return s.file.Close() }

// Backup copies the store as it is at one moment to a file beside it, which takes as much room as the store itself. The
// transaction ends when this returns: how slowly the Snapshot is read costs the store nothing.
func (s *Store) Backup(ctx context.Context) (*Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, backupTime)
	defer cancel()
	dir := filepath.Dir(s.db.Path())
	f, err := os.CreateTemp(dir, ".meshca-backup-*") // mode 0600
	if err != nil {
		return nil, fmt.Errorf("a file for the backup in %s: %w", dir, err)
	}
	snapshot := &Snapshot{file: f}
	err = os.Remove(f.Name())
	if err == nil {
		err = s.copyTo(ctx, snapshot)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("copying the store to a file in %s, which needs as much room as the store has: %w", dir, err), f.Close())
	}
	return snapshot, nil
}

func (s *Store) copyTo(ctx context.Context, to *Snapshot) error {
	out := &digestWriter{ctx: ctx, w: bufio.NewWriterSize(to.file, 1<<20), inner: sha256.New(), whole: sha256.New()}
	resume, err := s.young.settle()
	defer resume()
	if err != nil {
		return err
	}
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		resume() // what comes now is not of this moment
		st, err := readState(tx, s.db.Path())
		if err != nil {
			return err
		}
		td, err := st.Bundle.TrustDomain()
		if err != nil {
			return err
		}
		to.Header = Header{
			Made: time.Now().UTC(), TrustDomain: td, Schema: st.Schema, Size: tx.Size(), Generation: st.Mark.Generation,
			Tag: hex.EncodeToString(st.Mark.Tag[:]), BundleSequence: st.Bundle.Sequence, Rollout: string(st.Rollout.Step), Denials: len(st.Denials),
			LedgerEntries: st.LedgerEntries, LedgerLast: st.LedgerLast, LastIssued: st.LastIssued.UTC(),
		}
		header, err := json.Marshal(to.Header)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(out, "%s%s\n", backupMagic, header); err != nil {
			return err
		}
		_, err = tx.WriteTo(out)
		return err
	})
	if err != nil {
		return err
	}
	if _, err := out.Write(out.inner.Sum(nil)); err != nil {
		return err
	}
	to.Bytes = out.n
	out.whole.Sum(to.SHA256[:0])
	return out.w.Flush()
}

// digestWriter writes until ctx ends, and digests what it wrote.
type digestWriter struct {
	ctx context.Context
	w   *bufio.Writer
	n   int64
	// inner is the digest that becomes the trailer; whole goes on over it.
	inner, whole hash.Hash
}

func (d *digestWriter) Write(p []byte) (int, error) {
	if err := d.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := d.w.Write(p)
	d.n += int64(n)
	d.inner.Write(p[:n])
	d.whole.Write(p[:n])
	return n, err
}

// extract checks a backup as it is read, and writes the store's file that it holds to w. Whatever it wrote is worth
// nothing when it returns an error.
func extract(from io.Reader, w io.Writer) (Header, error) {
	sum := sha256.New()
	in := bufio.NewReaderSize(from, 1<<20)
	magic := make([]byte, len(backupMagic))
	if _, err := io.ReadFull(in, magic); err != nil || string(magic) != backupMagic {
		return Header{}, fmt.Errorf("%w: it does not begin as a backup of `certctl backup` does", ErrBackup)
	}
	line, err := readLine(in)
	if err != nil {
		return Header{}, err
	}
	sum.Write(magic)
	sum.Write(line)
	var h Header
	if err := json.Unmarshal(line, &h); err != nil || h.Size <= 0 {
		return Header{}, fmt.Errorf("%w: its header cannot be read", ErrBackup)
	}
	if h.Schema > SchemaVersion {
		return h, fmt.Errorf("%w: the backup has schema %d, this build knows %d. Restore it with the meshca that made it", ErrSchema, h.Schema, SchemaVersion)
	}
	n, err := io.CopyN(io.MultiWriter(w, sum), in, h.Size)
	switch {
	case errors.Is(err, io.EOF):
		return h, fmt.Errorf("%w: it ends after %d of the store's %d bytes. It was cut off; take another one", ErrBackup, n, h.Size)
	case err != nil:
		return h, err
	}
	trailer := make([]byte, sha256.Size+1)
	switch n, _ := io.ReadFull(in, trailer); {
	case n < sha256.Size:
		return h, fmt.Errorf("%w: its digest is missing. It was cut off; take another one", ErrBackup)
	case n > sha256.Size:
		return h, fmt.Errorf("%w: something follows its end", ErrBackup)
	}
	if !bytes.Equal(trailer[:sha256.Size], sum.Sum(nil)) {
		return h, fmt.Errorf("%w: its SHA-256 is not the one that it ends with. It was changed or damaged; take another one", ErrBackup)
	}
	return h, nil
}

func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for len(line) < maxHeaderBytes {
		b, err := in.ReadByte()
		if err != nil {
			return nil, fmt.Errorf("%w: its header is cut off", ErrBackup)
		}
		if line = append(line, b); b == '\n' {
			return line, nil
		}
	}
	return nil, fmt.Errorf("%w: its header has more than %d bytes", ErrBackup, maxHeaderBytes)
}
