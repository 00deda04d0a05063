package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// backupWait is how long a backup may take without --timeout: it is as large as the ledger.
const backupWait = 10 * time.Minute

func (c *cli) backupCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "backup FILE", Short: "Back the CA's store up, while it runs", Args: args(1, 1, "one FILE, or - for the standard output"),
		Long: `Writes the store as it is at one moment to a new file, mode 0600: the trust bundle, the rollout of roots, denials and
orders, what is known of agents, and the ledger. "meshca restore" puts it back. The file has its name only when it is
whole and its digest is right; one that is there stays, unless --force is given. "-" writes to the standard output, and
the exit code says whether all came.

It holds no private key that signs: intermediates' keys are in the CA's memory, and a root on disk is in files of its
own, which must be kept too.`,
		Example: `  certctl backup /var/backups/meshca-$(date +%F).backup
  certctl backup - | ssh vault-of-backups 'cat > meshca.backup'`,
	}
	cmd.Flags().BoolVar(&force, "force", false, "replace FILE if it is there")
	cmd.RunE = func(cmd *cobra.Command, given []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		if !c.timeoutSet {
			c.timeout = backupWait
		}
		ctx, cancel := c.within(cmd)
		defer cancel()
		if given[0] == "-" {
			return c.backupToOutput(ctx, force)
		}
		return c.backupToFile(ctx, given[0], force)
	}
	return cmd
}

func (c *cli) backupToOutput(ctx context.Context, force bool) error {
	switch {
	case force:
		return usage("--force is for a FILE")
	case c.format != formatTable:
		return usage("-o %s and the backup cannot both go to the standard output", c.format)
	case c.screen():
		return usage("a backup is not for a terminal: name a FILE, or send the output elsewhere")
	}
	out := bufio.NewWriterSize(c.out, 1<<20)
	s, err := c.receiveBackup(ctx, out)
	if err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return no("the backup could not be written", err, "")
	}
	fmt.Fprintf(c.err, "certctl: backed up %d bytes, SHA-256 %s\n", s.GetBytes(), s.GetSha256())
	return nil
}

func (c *cli) backupToFile(ctx context.Context, path string, force bool) (err error) {
	if _, err := os.Lstat(path); err == nil && !force {
		return alreadyThere(path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return no("the backup could not be written", err, "")
	}
	defer func() { _ = os.Remove(f.Name()) }() // it has another name by then, or is not whole
	out := bufio.NewWriterSize(f, 1<<20)
	s, err := c.receiveBackup(ctx, out)
	if err != nil {
		_ = f.Close()
		return err
	}
	if err = out.Flush(); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = name(f.Name(), path, force)
	}
	if errors.Is(err, fs.ErrExist) {
		return alreadyThere(path)
	}
	if err != nil {
		return no("the backup could not be written", err, "")
	}
	return c.show(s, func(p *page) { drawBackup(p, path, s) })
}

func alreadyThere(path string) error {
	return no(path+" is there already", nil, "Name another file, or replace it with --force")
}

// name gives a whole file its name, and makes that durable. Without force nothing that is there is replaced.
func name(from, to string, force bool) error {
	if force {
		if err := os.Rename(from, to); err != nil {
			return err
		}
	} else if err := os.Link(from, to); err != nil {
		return err
	}
	if runtime.GOOS == "windows" { // which has no such thing as a directory to sync
		return nil
	}
	d, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// receiveBackup writes the backup's bytes to out, and holds them to their digest.
func (c *cli) receiveBackup(ctx context.Context, out io.Writer) (*meshcav1.BackupSummary, error) {
	conn, err := c.openCA(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stream, err := conn.CA.Backup(ctx, &meshcav1.BackupRequest{})
	if err != nil {
		return nil, theCA.failed(err)
	}
	return gatherBackup(stream, out, sha256.New())
}

func gatherBackup(stream grpc.ServerStreamingClient[meshcav1.BackupResponse], out io.Writer, sum hash.Hash) (*meshcav1.BackupSummary, error) {
	for n := uint64(0); ; {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, &failure{code: exitUnreachable, what: "the backup is not whole", why: fmt.Sprintf("the CA ended it after %d bytes", n), next: "Try again, and look at the CA's log"}
		}
		if err != nil {
			return nil, theCA.failed(err)
		}
		if s := m.GetSummary(); s != nil {
			if got := hex.EncodeToString(sum.Sum(nil)); got != s.GetSha256() || n != s.GetBytes() {
				return nil, no("the backup is not whole", fmt.Errorf("%d bytes with SHA-256 %s came, %d with %s were sent", n, got, s.GetBytes(), s.GetSha256()), "Try again")
			}
			return s, nil
		}
		if _, err := out.Write(m.GetChunk()); err != nil {
			return nil, no("the backup could not be written", err, "")
		}
		sum.Write(m.GetChunk())
		n += uint64(len(m.GetChunk()))
	}
}

func drawBackup(p *page, path string, s *meshcav1.BackupSummary) {
	p.line("%s is a backup of %s", path, s.GetTrustDomain())
	list := []pair{
		{"bytes", textf("%d", s.GetBytes())}, {"SHA-256", text(s.GetSha256())}, {"made at", p.when(s.GetMadeAt())},
		{"bundle", textf("sequence %d", s.GetBundleSequence())}, {"denials", textf("%d", s.GetDenials())},
	}
	if s.GetRolloutStep() != "" {
		list = append(list, pair{"rollout", text(s.GetRolloutStep())})
	}
	p.pairs(append(list, pair{"ledger", textf("%d entries up to %d", s.GetLedgerEntries(), s.GetLedgerLast())})...)
	p.line("It holds no root key: keep those of a root on disk apart. `meshca restore` puts it back.")
}
