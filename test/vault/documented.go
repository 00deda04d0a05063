package vault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/meshca/meshca/test/parts"
)

// Commands are those that deploy/vault/README.md has between this heading and the next one.
func Commands(heading string) (string, error) {
	root, err := parts.Root()
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(filepath.Join(root, "deploy", "vault", "README.md"))
	if err != nil {
		return "", err
	}
	commands := strings.Join(blocks(string(text), heading, "sh"), "\n")
	if commands == "" {
		return "", fmt.Errorf("deploy/vault/README.md has no commands under %q", heading)
	}
	return commands, nil
}

// Documented is a Vault that was set up as deploy/vault/README.md tells, by its own commands, with an AppRole for meshca.
type Documented struct {
	server *Server
	text   string
	dir    string
	// Upstream is the piece `upstream:` for meshca's configuration.
	Upstream string
}

// Headings of the parts of deploy/vault/README.md that make a set-up.
const (
	headRoot   = "## 1. The root"
	headPolicy = "## 2. What meshca may do"
	headLogin  = "### AppRole"
	headNext   = "## The next root"
)

// SetUp runs the documented commands against s, which has no mount of that name yet. What they write goes to dir, which
// must not hold such files yet.
func SetUp(ctx context.Context, s *Server, dir string) (*Documented, error) {
	root, err := parts.Root()
	if err != nil {
		return nil, err
	}
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(root, "deploy", "vault"))); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		return nil, err
	}
	d := &Documented{server: s, text: string(text), dir: dir}
	for _, heading := range []string{headRoot, headPolicy, headLogin} {
		if err := d.run(ctx, blocks(d.text, heading, "sh")); err != nil {
			return nil, fmt.Errorf("%s: %w", heading, err)
		}
	}
	config := strings.Join(blocks(d.text, headLogin, "yaml"), "")
	d.Upstream = strings.NewReplacer("https://vault.example:8200", s.Address, "/etc/meshca/vault-ca.pem", s.CAFile, "/etc/meshca/", dir+"/").Replace(config)
	if !strings.HasPrefix(config, "upstream:") || strings.Contains(d.Upstream, "vault.example") || strings.Contains(d.Upstream, "/etc/") {
		return nil, fmt.Errorf("deploy/vault/README.md has no configuration under %q that could be used here:\n%s", headLogin, d.Upstream)
	}
	return d, nil
}

// NextRoot makes one more issuer in the mount, of this name, by the documented command.
func (d *Documented) NextRoot(ctx context.Context, name string) error {
	const example = "issuer_name=root-2"
	blocks := blocks(d.text, headNext, "sh")
	if len(blocks) != 1 || !strings.Contains(blocks[0], example) {
		return fmt.Errorf("deploy/vault/README.md has no single command with %s under %q", example, headNext)
	}
	return d.run(ctx, []string{strings.ReplaceAll(blocks[0], example, "issuer_name="+name)})
}

// run runs commands as the one who administers Vault would.
func (d *Documented) run(ctx context.Context, commands []string) error {
	if len(commands) == 0 {
		return errors.New("deploy/vault/README.md has no commands there")
	}
	binary, err := parts.Find("vault")
	if err != nil {
		return err
	}
	script := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", strings.Join(commands, "\n"))
	script.Dir = d.dir
	script.Env = []string{"PATH=" + filepath.Dir(binary) + ":" + os.Getenv("PATH"), "HOME=" + d.dir,
		"VAULT_ADDR=" + d.server.Address, "VAULT_TOKEN=" + d.server.RootToken, "VAULT_CACERT=" + d.server.CAFile}
	if out, err := script.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// blocks are the fenced blocks of a language between this heading and the next one.
func blocks(text, heading, language string) []string {
	var all []string
	var block *strings.Builder
	within, fenced := false, false
	for line := range strings.Lines(text) {
		trimmed := strings.TrimRight(line, "\n")
		switch {
		case fenced && trimmed == "```":
			if block != nil {
				all = append(all, block.String())
			}
			block, fenced = nil, false
		case fenced:
			if block != nil {
				block.WriteString(line)
			}
		case strings.HasPrefix(trimmed, "```"):
			fenced = true
			if within && trimmed == "```"+language {
				block = &strings.Builder{}
			}
		case strings.HasPrefix(trimmed, "#"):
			within = trimmed == heading
		}
	}
	return all
}
