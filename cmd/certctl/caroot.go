package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

func (c *cli) rootCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "root", Short: "Export roots, and trust another one's"}
	cmd.RunE = c.group(cmd)
	cmd.AddCommand(c.rootExportCommand(), c.rootImportCommand(), c.rootRemoveCommand())
	return cmd
}

func (c *cli) rootExportCommand() *cobra.Command {
	var id string
	cmd := &cobra.Command{
		Use: "export [--root ID]", Short: "Write the roots of the trust bundle to the standard output, as PEM", Args: args(0, 0, "no arguments, but --root ID"),
		Long: `Writes the roots that everyone trusts, or one of them, as PEM; "-o json" and "-o yaml" wrap it in a document. For a
bundle with its sequence, see "certctl bundle export".`,
	}
	cmd.Flags().StringVar(&id, "root", "", "this root alone: its `ID`, the SHA-256 of its certificate, or how that begins")
	_ = cmd.RegisterFlagCompletionFunc("root", c.completeRoots)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		b, _, err := c.bundle(cmd)
		if err != nil {
			return err
		}
		roots := b.X509Authorities()
		if cmd.Flags().Changed("root") {
			one, err := findRoot(roots, id)
			if err != nil {
				return err
			}
			roots = []*x509.Certificate{one}
		}
		encoded := encodePEM(roots)
		if c.format == formatTable {
			_, err = c.out.Write(encoded)
			return err
		}
		return c.show(map[string]string{"pem": string(encoded)}, nil)
	}
	return cmd
}

// leastID is how much of an ID must be typed.
const leastID = 4

// findRoot finds the root whose ID begins with what was typed; openssl writes fingerprints in upper case, with colons.
func findRoot(roots []*x509.Certificate, typed string) (*x509.Certificate, error) {
	prefix := strings.ToLower(strings.ReplaceAll(typed, ":", ""))
	var found []*x509.Certificate
	var all []string
	for _, r := range roots {
		id := fingerprint(r.Raw)
		all = append(all, shortID(id))
		if len(prefix) >= leastID && strings.HasPrefix(id, prefix) {
			found = append(found, r)
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	return nil, no(fmt.Sprintf("%.64q names %s of the trust bundle", typed, plural(len(found), "root", "roots")), nil, "It has "+strings.Join(all, ", "))
}

// maxRootsFile is what the CA takes at a time.
const maxRootsFile = 256 << 10

func (c *cli) rootImportCommand() *cobra.Command {
	return &cobra.Command{
		Use: "import FILE", Short: "Trust roots that sign for nobody here", Args: args(1, 1, "one file of PEM certificates, or - for the standard input"),
		Long: `Takes self-signed CA certificates into the trust bundle, all of the file or none: at most 16, and 256 KiB. From then
on every proxy accepts what they sign for this trust domain. It is for those who move in with certificates of another CA;
to replace the root that signs, "certctl ca rotate root" does this by itself. "certctl ca root remove" undoes it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.caOnly(cmd); err != nil {
				return err
			}
			ctx, cancel := c.within(cmd)
			defer cancel()
			data, err := c.read(ctx, "the roots", args[0], maxRootsFile)
			if err != nil {
				return err
			}
			// What is no certificate stays on this side of the socket: it may be a key.
			for rest := data; ; {
				var block *pem.Block
				if block, rest = pem.Decode(rest); block == nil {
					break
				}
				if block.Type != "CERTIFICATE" {
					return no(fmt.Sprintf("%s holds a %.64q", args[0], block.Type), nil, "Nothing was sent: import certificates alone")
				}
			}
			if key := []byte("PRIVATE KEY-----"); bytes.Contains(data, key) {
				return no(args[0]+" holds a private key", nil, "Nothing was sent: import certificates alone")
			}
			r, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.TrustRootResponse, error) {
				return a.TrustRoot(ctx, &meshcav1.TrustRootRequest{Pem: data})
			})
			if err != nil {
				return err
			}
			return c.show(r, func(p *page) { drawImported(p, r, data) })
		},
	}
}

func drawImported(p *page, r *meshcav1.TrustRootResponse, data []byte) {
	var rows [][]cell
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			continue // the CA read it: it is of a newer kind than this program knows
		}
		id := fingerprint(cert.Raw)
		what := text("was trusted before")
		if slices.Contains(r.GetAdded(), id) {
			what = text("trusted from now on").as(doubtful)
		}
		rows = append(rows, []cell{text(shortID(id)), text(cert.Subject.String()), what, p.ends(timestamppb.New(cert.NotBefore), timestamppb.New(cert.NotAfter))})
	}
	p.table([]string{"ROOT", "SUBJECT", "IS", "ENDS"}, rows)
	p.line("the trust bundle has sequence %d; `certctl ca status` shows who has it, `certctl ca root remove` takes a root out again", r.GetBundleSequence())
}

func (c *cli) rootRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "remove ID", Short: "Take a root out of the trust bundle that nothing needs", Args: args(1, 1, "one root's ID"),
		Long: `Takes out a root that signs for nobody, that no rollout needs, and under which this CA has issued nothing that still
lives. What others have under it is refused from then on. A root that the CA's configuration names as an extra anchor
comes back at its next start: take it out there first.`,
		ValidArgsFunction: c.completeRootArgument,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.caOnly(cmd); err != nil {
				return err
			}
			b, _, err := c.bundle(cmd)
			if err != nil {
				return err
			}
			root, err := findRoot(b.X509Authorities(), args[0])
			if err != nil {
				return err
			}
			r, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.RemoveRootResponse, error) {
				return a.RemoveRoot(ctx, &meshcav1.RemoveRootRequest{Id: fingerprint(root.Raw)})
			})
			if err != nil {
				return err
			}
			return c.show(r, func(p *page) {
				p.line("root %s (%s) is out of the trust bundle, which has sequence %d now", shortID(fingerprint(root.Raw)), root.Subject, r.GetBundleSequence())
			})
		},
	}
}
