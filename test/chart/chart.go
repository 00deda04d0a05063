// Package chart renders the Helm chart, and makes of it what is committed beside it: the plain manifests, and the table of
// values in its README.
package chart

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/meshca/meshca/test/parts"
)

// Where things are, from the root of the repository.
const (
	Dir       = "deploy/chart/meshca"
	Manifests = "deploy/manifests/meshca.yaml"
	README    = Dir + "/README.md"
)

// oldest is the Kubernetes version that the manifests are for: the first that the chart takes.
const oldest = "1.30.0"

// Render is what `helm install meshca` would send to a cluster of the oldest version, in the namespace meshca.
func Render(ctx context.Context, args ...string) (string, error) {
	helm, err := parts.Find("helm")
	if err != nil {
		return "", err
	}
	root, err := parts.Root()
	if err != nil {
		return "", err
	}
	args = append([]string{"template", "meshca", filepath.Join(root, Dir), "--namespace=meshca", "--kube-version=" + oldest}, args...)
	cmd := exec.CommandContext(ctx, helm, args...)
	home, err := os.MkdirTemp("", "helm-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(home)
	cmd.Env = append(os.Environ(), "HOME="+home, "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("helm template: %w: %s", err, problems.String())
	}
	return out.String(), nil
}

const head = `# Made of deploy/chart/meshca with its default values, by ` + "`make manifests`" + `: change the chart, not this file. It is for
#   kubectl apply -f deploy/manifests/meshca.yaml
# and for kustomize. For Kubernetes 1.30 and later.
apiVersion: v1
kind: Namespace
metadata:
  name: meshca
  labels:
    # Agents are privileged; why stands at their containers. The CA would do with "restricted".
    pod-security.kubernetes.io/enforce: privileged
`

// PlainManifests are the manifests for those who do not use Helm.
func PlainManifests(ctx context.Context) (string, error) {
	rendered, err := Render(ctx)
	if err != nil {
		return "", err
	}
	var lines []string
	for line := range strings.SplitSeq(rendered, "\n") {
		if !strings.HasPrefix(line, "# Source: ") {
			lines = append(lines, strings.TrimRight(line, " "))
		}
	}
	return head + strings.Join(lines, "\n"), nil
}

var appVersion = regexp.MustCompile(`(?m)^appVersion: (\S+)$`)

// AppVersion is the version of meshca that the chart installs, and its images' tag.
func AppVersion() (string, error) {
	root, err := parts.Root()
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(filepath.Join(root, Dir, "Chart.yaml"))
	if err != nil {
		return "", err
	}
	found := appVersion.FindSubmatch(text)
	if found == nil {
		return "", fmt.Errorf("%s/Chart.yaml has no appVersion", Dir)
	}
	return string(found[1]), nil
}
